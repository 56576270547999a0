"""Built-in environments: a calculator, Python in the sandbox, and files that can be restored."""

from __future__ import annotations

import ast
import operator
from typing import Any

from e3rl.environments.sandbox import run_program

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_LARGEST = 10**60


class Calculator:
    """Arithmetic, and nothing else."""

    def reset(self, **row: Any) -> None:
        """It has no state."""

    def calculate(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: numbers with + - * / // % ** and parentheses, for example (3 + 4) * 2.
        """
        if len(expression) > 1000:
            raise ValueError("an expression of more than 1000 characters")
        try:
            value = _value(ast.parse(expression.strip(), mode="eval").body)
        except SyntaxError:
            raise ValueError("not an arithmetic expression") from None
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 100 or abs(left) > 10**6):
            raise ValueError("a power that is too large")
        result = _OPERATORS[type(node.op)](left, right)
        if isinstance(result, complex) or abs(result) > _LARGEST:
            raise ValueError("a result that is too large or no real number")
        return result  # type: ignore[no-any-return]
    raise ValueError("not an arithmetic expression")


class PythonTool:
    """Python programs, each in its own sandbox: no network, no files, 5 seconds."""

    def reset(self, **row: Any) -> None:
        """It has no state."""

    def python(self, code: str) -> str:
        """Run a Python program with the standard library and return what it prints.

        Args:
            code: the program; print what you want to see.
        """
        ran = run_program(code)
        if ran.failure is not None:
            raise RuntimeError(ran.failure)
        return ran.stdout


class Files:
    """A small directory of texts in memory. It starts with the row's ``files``, a table of names and texts."""

    largest = 2**16

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def reset(self, files: dict[str, str] | None = None, **row: Any) -> None:
        """Begin with the row's files."""
        self._files = dict(files or {})

    def snapshot(self) -> dict[str, str]:
        """All files."""
        return dict(self._files)

    def restore(self, snapshot: dict[str, str]) -> None:
        """Restore the state that `snapshot` returned."""
        self._files = dict(snapshot)

    def list_files(self) -> str:
        """List the names of all files, one a line."""
        return "\n".join(sorted(self._files))

    def read_file(self, name: str) -> str:
        """Read a file.

        Args:
            name: the file's name.
        """
        if name not in self._files:
            raise FileNotFoundError(f"no file {name}")
        return self._files[name]

    def write_file(self, name: str, text: str) -> str:
        """Write a file, in place of what it held.

        Args:
            name: the file's name.
            text: what it shall hold.
        """
        if len(text) + sum(map(len, self._files.values())) > self.largest:
            raise ValueError(f"more than {self.largest} characters in all files")
        self._files[name] = text
        return f"{len(text)} characters written"

    def delete_file(self, name: str) -> str:
        """Delete a file.

        Args:
            name: the file's name.
        """
        if self._files.pop(name, None) is None:
            raise FileNotFoundError(f"no file {name}")
        return "deleted"
