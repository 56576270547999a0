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
_DEEPEST, _MOST_READ = 60, 100_000
"""Expressions inside each other that are calculated, and in all: a name may stand twice in what another stands for."""
_CHANGES = ("update", "setdefault", "pop", "clear", "append", "extend", "insert", "remove")
"""Methods that change a list or dictionary in place."""
_PARSERS = ("parse_args_and_config", "parse_args_into_dataclasses")
"""Methods of TrlParser and HfArgumentParser, which return the settings of TRL's command line."""
_COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.eq, ast.IsNot: operator.ne,
    ast.In: lambda part, whole: part in whole, ast.NotIn: lambda part, whole: part not in whole,
}  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class _Binding:
    """A name's value, where it was bound, and whether that happens on every path through the script."""

    value: ast.expr
    line: int
    certain: bool


class Source:
    """A parsed script. ``remarks``: what could not be read, a sentence each."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.remarks: list[str] = []
        self._read = self._depth = 0
        self._scopes = _scopes(tree)
        self._bound: dict[tuple[Scope | None, str], list[_Binding]] = {}
        self.functions: dict[str, Function] = {}
        self.imports: dict[str, str] = {}
        self.attributes: list[tuple[str, str, ast.expr, bool]] = []
        """Owner, name and value of an attribute that is set, and whether that happens on every path."""
        self.settings: set[str] = set()
        """Names of what a parser of TRL's command line returned."""
        self._bodies: list[tuple[Scope, bool]] = []  # read after the code around them
        self._collect(tree.body, None, certain=True)
        while self._bodies:
            scope, certain = self._bodies.pop(0)
            if isinstance(scope, Function):
                self._bind_parameters(scope)
            self._collect(scope.body, scope, certain)

    @property
    def runs_when_imported(self) -> bool:
        """Whether importing the script runs all of it: it has no ``if __name__ == "__main__"``."""
        return not any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in self.tree.body)

    def importable(self, function: str) -> bool:
        """Whether ``function`` is one of the script's that an import of it gives."""
        return any(isinstance(n, Function) and n.name == function for n in self.tree.body)

    def calls(self, name: str) -> list[ast.Call]:
        """Calls of ``name``, also as an attribute (``module.name``)."""
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and called(n) == name]

    def parsed(self, node: ast.AST | None) -> bool:
        """Whether this is a setting of TRL's command line, or all of them, which the script parses."""
        node = node.value if isinstance(node, ast.Attribute) else node
        return isinstance(node, ast.Name) and node.id in self.settings

    def _collect(self, body: Sequence[ast.stmt], scope: Scope | None, certain: bool) -> None:
        """Bindings in the order of the source, each in the function or class that it belongs to."""
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._bind(target, node.value, scope, certain)
            elif isinstance(node, ast.AugAssign):
                self._bind(node.target, self._after(node), scope, certain)
            elif isinstance(node, Scope):
                if isinstance(node, Function):
                    self.functions[node.name] = node
                self._bodies.append((node, certain))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.imports |= {a.asname or a.name: f"{node.module}:{a.name}" for a in node.names}
            elif isinstance(node, ast.Expr):
                self._forget_changed(node.value, scope)
            elif isinstance(node, ast.With) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
                self._collect(node.body, scope, certain)
            elif isinstance(node, ast.If) and isinstance(taken := self._decided(node.test), bool):
                self._collect(node.body if taken else node.orelse, scope, certain)
            else:
                if isinstance(node, ast.For):
                    self._bind(node.target, None, scope, certain=False)
                for name in ("body", "orelse", "handlers", "finalbody"):
                    self._collect(getattr(node, name, []) or [], scope, certain=False)

    def _bind(self, target: ast.expr, value: ast.expr | None, scope: Scope | None, certain: bool) -> None:
        """Bind a target of an assignment; ``value`` None: to something unknown."""
        if isinstance(target, ast.Name):
            known = value if value is not None else target
            bindings = self._bound.setdefault((scope, target.id), [])
            bindings.append(_Binding(known, target.lineno, certain and value is not None))
            made = value.value if isinstance(value, ast.Subscript) else value
            if isinstance(made, ast.Call) and called(made) in _PARSERS:
                self.settings.add(target.id)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and value is not None:
            self.attributes.append((target.value.id, target.attr, value, certain))
        elif isinstance(target, ast.Subscript):
            self._bind(target.value, None, scope, certain=False)
        elif isinstance(target, ast.Tuple | ast.List):
            for part, its in zip(target.elts, self._parts(value, len(target.elts)), strict=True):
                self._bind(part, its, scope, certain)

    def _parts(self, value: ast.expr | None, count: int) -> Sequence[ast.expr | None]:
        """The values that unpacking gives: of a tuple, a parser of the command line, or load_dataset with a list of splits."""
        if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == count:
            return value.elts
        if isinstance(value, ast.Call) and called(value) in _PARSERS:
            return [value] * count
        splits = next((k.value for k in getattr(value, "keywords", ()) if k.arg == "split"), None)
        if isinstance(value, ast.Call) and isinstance(splits, ast.List) and len(splits.elts) == count:
            others = [k for k in value.keywords if k.arg != "split"]
            each = [ast.Call(value.func, value.args, [*others, ast.keyword("split", s)]) for s in splits.elts]
            return [ast.copy_location(call, value) for call in each]
        return [None] * count

    def _after(self, node: ast.AugAssign) -> ast.expr:
        """The value of ``x += 1``, as an expression of the x before."""
        before: ast.expr = node.target
        if isinstance(before, ast.Name):
            before = ast.copy_location(ast.Name(before.id, ast.Load()), node)
            self._scopes[id(before)] = self._scopes.get(id(node))
        return ast.copy_location(ast.BinOp(before, node.op, node.value), node)

    def _bind_parameters(self, function: Function) -> None:
        """Bind parameters to their arguments where the function is called once, to their defaults where without arguments."""
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        defaults |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
        calls = self.calls(function.name)
        plain = not any(isinstance(a, ast.Starred) for c in calls for a in c.args)
        plain = plain and all(k.arg for c in calls for k in c.keywords)
        given = self.given(calls[0], names) if plain and len(calls) == 1 else {}
        known = plain and bool(calls) and (len(calls) == 1 or not any(c.args or c.keywords for c in calls))
        for name in (*names, *(a.arg for a in arguments.kwonlyargs)):
            value = given.get(name, defaults.get(name))
            binding = _Binding(value or ast.Name(name, ast.Load()), function.lineno, known and value is not None)
            self._bound.setdefault((function, name), []).append(binding)

    def _forget_changed(self, node: ast.expr, scope: Scope | None) -> None:
        """A list or dictionary that a method changes is no longer what it was bound to."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
            self._bind(node.func.value, None, scope, certain=False)

    def _decided(self, test: ast.expr) -> bool | None:
        """The outcome of a condition on constants; None where only running the script would tell."""
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in _COMPARISONS:
            left, right = self.value(test.left), self.value(test.comparators[0])
            try:
                return None if UNKNOWN in (left, right) else bool(_COMPARISONS[type(test.ops[0])](left, right))
            except TypeError:
                return None  # the script would fail here
        value = self.value(test)
        return value if isinstance(value, bool) else None

    def _binding(self, node: ast.Name) -> _Binding | None:
        """What a name is bound to where it is used. Around a function, only a name that is bound once is certain."""
        scope = self._scopes.get(id(node))
        if own := self._bound.get((scope, node.id)):
            before = [b for b in own if b.line < getattr(node, "lineno", 0)]
            return before[-1] if before else None
        while scope is not None:
            scope = self._scopes.get(id(scope))
            around = self._bound.get((scope, node.id))
            if around and not isinstance(scope, ast.ClassDef):
                return around[0] if len(around) == 1 else None
        return None

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
        """The value of a name where it is used, or what a function of the script returns; the node itself if unknown."""
        for _ in range(100):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.functions:
                found = _returned(self.functions[node.func.id])
            elif isinstance(node, ast.Name):
                binding = self._binding(node)
                found = binding.value if binding and binding.certain else None
            else:
                return node
            if found is None:
                return node
            node = found
        return node

    def value(self, node: ast.expr | None) -> Any:
        """A constant of the script; ``UNKNOWN`` where it would have to be run."""
        self._read = self._read + 1 if self._depth else 0
        if self._depth == _DEEPEST or self._read > _MOST_READ:
            return UNKNOWN
        self._depth += 1
        try:
            return None if node is None else self._value(self.follow(node))
        finally:
            self._depth -= 1

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _combined(type(node.op), self.value(node.left), self.value(node.right))
        if isinstance(node, ast.JoinedStr):
            parts = [self.value(v.value if isinstance(v, ast.FormattedValue) else v) for v in node.values]
            plain = all(not isinstance(v, ast.FormattedValue) or v.format_spec is None for v in node.values)
            return "".join(map(str, parts)) if plain and UNKNOWN not in parts else UNKNOWN
        if isinstance(node, ast.List | ast.Tuple):
            several = [self.value(item) for item in node.elts]
            return UNKNOWN if UNKNOWN in several else several
        if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
            pairs = {k.value: self.value(v) for k, v in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
            return UNKNOWN if UNKNOWN in pairs.values() else pairs
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr  # torch.bfloat16
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return UNKNOWN

    def meanings(self, name: ast.Name) -> list[ast.AST | None]:
        """What the script's code binds a name to where it is used: expressions, functions and classes; None: not one value."""
        definitions = [n for n in ast.walk(self.tree) if isinstance(n, Scope) and n.name == name.id]
        found: list[ast.AST | None] = [n for n in definitions if not isinstance(self._scopes[id(n)], ast.ClassDef)]
        scope = self._scopes.get(id(name))
        around = [scope]
        while scope is not None:
            scope = self._scopes.get(id(scope))
            around.append(scope)
        if any((scope, name.id) in self._bound for scope in around):
            binding = self._binding(name)
            found.append(binding.value if binding and binding.certain else None)
        return found

    def remark(self, node: ast.AST, what: str, why: str = "") -> None:
        """Note that something does not carry over, with its line."""
        why = why or "scripts are not run, and only running it would tell; set it by hand"
        self.remarks.append(f"{what}: line {getattr(node, 'lineno', 0)}: {why}")


def _scopes(tree: ast.Module) -> dict[int, Scope | None]:
    """The function or class around each node, by the node's id; None: the module."""
    found: dict[int, Scope | None] = {}
    waiting: list[tuple[ast.AST, Scope | None]] = [(tree, None)]
    while waiting:
        node, scope = waiting.pop()
        for child in ast.iter_child_nodes(node):
            found[id(child)] = scope
            waiting.append((child, child if isinstance(child, Scope) else scope))
    return found


def _returned(function: Function) -> ast.expr | None:
    """What a function returns in its last line, if it returns nowhere else."""
    inner = {id(m) for n in ast.walk(function) if isinstance(n, Scope) and n is not function for m in ast.walk(n)}
    returns = [n for n in ast.walk(function) if isinstance(n, ast.Return) and id(n) not in inner]
    last = function.body[-1]
    return last.value if isinstance(last, ast.Return) and len(returns) == 1 else None


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
