"""A Python script as a source of constants: parsed, never run. Names are followed to what they were last bound to."""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
UNKNOWN = object()
"""A value that only running the script would give."""
_LARGEST = 2**64


@dataclass(frozen=True)
class _Binding:
    """A name's value, where it was bound, and whether that happens on every path through the script."""

    value: ast.expr
    line: int
    certain: bool


class Source:
    """A parsed script. ``remarks``: what could not be read, a sentence each."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self.remarks: list[str] = []
        self._bound: dict[str, list[_Binding]] = {}
        self.functions: set[str] = set()
        self.imports: dict[str, str] = {}
        self.attributes: list[tuple[str, str, ast.expr]] = []
        self._collect(tree.body, certain=True)

    @property
    def runs_when_imported(self) -> bool:
        """Whether importing the script runs all of it: it has no ``if __name__ == "__main__"``."""
        return not any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in self._tree.body)

    def calls(self, name: str) -> list[ast.Call]:
        """Calls of ``name``, also as an attribute (``module.name``)."""
        return [n for n in ast.walk(self._tree) if isinstance(n, ast.Call) and called(n) == name]

    def _collect(self, body: Sequence[ast.stmt], certain: bool) -> None:
        """Bindings in the order of the source; functions are read like the module around them."""
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    self._bind(target, node.value, node.lineno, certain)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.add(node.name)
                self._collect(node.body, certain)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.imports |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
            elif isinstance(node, ast.With) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
                self._collect(node.body, certain)
            else:
                for name in ("body", "orelse", "handlers", "finalbody"):
                    self._collect(getattr(node, name, []) or [], certain=False)

    def _bind(self, target: ast.expr, value: ast.expr | None, line: int, certain: bool) -> None:
        if isinstance(target, ast.Name) and value is not None:
            self._bound.setdefault(target.id, []).append(_Binding(value, line, certain))
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and value is not None:
            self.attributes.append((target.value.id, target.attr, value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, its in zip(target.elts, value.elts, strict=True):
                self._bind(part, its, line, certain)
        elif isinstance(target, ast.Tuple):
            for part in target.elts:  # a call that returns several values: none is known
                if isinstance(part, ast.Name):
                    self._bound.setdefault(part.id, []).append(_Binding(ast.Name("…", ast.Load()), line, False))

    def given(self, call: ast.Call, order: Sequence[str]) -> dict[str, ast.expr]:
        """Arguments by name, positional ones too; ``**{...}`` is opened where it is a dictionary of the script."""
        given: dict[str, ast.expr] = {}
        for name, node in zip(order, call.args, strict=False):
            if isinstance(node, ast.Starred):
                self.remark(node, f"*{ast.unparse(node.value)}")
                break
            given[name] = node
        for keyword in call.keywords:
            if keyword.arg is not None:
                given[keyword.arg] = keyword.value
                continue
            opened = self.follow(keyword.value)
            if isinstance(opened, ast.Call) and called(opened) == "dict" and not opened.args:
                given |= self.given(opened, ())
            elif isinstance(opened, ast.Dict) and all(isinstance(k, ast.Constant) for k in opened.keys):
                given |= {str(k.value): v for k, v in zip(opened.keys, opened.values, strict=True)}  # type: ignore[union-attr]
            else:
                self.remark(keyword.value, "**" + ast.unparse(keyword.value))
        return given

    def follow(self, node: ast.expr) -> ast.expr:
        """The value of a name where it is used; the node itself if that is unknown."""
        for _ in range(100):
            if not isinstance(node, ast.Name):
                return node
            before = [b for b in self._bound.get(node.id, ()) if b.line < getattr(node, "lineno", 0)]
            if not before or not before[-1].certain:
                return node
            node = before[-1].value
        return node

    def value(self, node: ast.expr | None) -> Any:
        """A constant of the script; ``UNKNOWN`` where it would have to be run."""
        if node is None:
            return None
        node = self.follow(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _combined(type(node.op), self.value(node.left), self.value(node.right))
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(v.value if isinstance(v, ast.FormattedValue) else v) for v in node.values]
            plain = all(not isinstance(v, ast.FormattedValue) or v.format_spec is None for v in node.values)
            return "".join(map(str, parts)) if plain and UNKNOWN not in parts else UNKNOWN
        if isinstance(node, ast.List | ast.Tuple):
            several = [self.value(item) for item in node.elts]
            return UNKNOWN if UNKNOWN in several else several
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr  # torch.bfloat16
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return UNKNOWN

    def remark(self, node: ast.AST, what: str, why: str = "") -> None:
        """Note that something does not carry over, with its line."""
        why = why or "scripts are not run, and only running it would tell; set it by hand"
        self.remarks.append(f"{what}: line {getattr(node, 'lineno', 0)}: {why}")


def called(call: ast.Call) -> str:
    return str(getattr(call.func, "id", getattr(call.func, "attr", "")))


def _combined(kind: type[ast.operator], left: Any, right: Any) -> Any:
    """Arithmetic on small numbers, and concatenation of texts."""
    texts = isinstance(left, str) and isinstance(right, str) and kind is ast.Add
    numbers = all(isinstance(v, int | float) and abs(v) < _LARGEST for v in (left, right))
    if not texts and not (numbers and (kind is not ast.Pow or abs(right) < 64)):
        return UNKNOWN
    try:
        return _OPERATORS[kind](left, right)
    except (ArithmeticError, ValueError):
        return UNKNOWN
