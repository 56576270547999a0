"""The dataset of a TRL script: its source, split and columns, and the code of ``map`` and ``filter`` as a module of its own.

The module is put together from the script's source and never run here; a recipe names its function in ``data.transform``.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from e3rl.integrations.script_source import UNKNOWN, Source, called

FUNCTION = "transform_row"
"""The function of the module that a recipe names."""
_TITLE = "How the rows of a TRL script's dataset are made, by the script's own code; for data.transform."
_BY_HAND = "run it once, save the rows with dataset.to_json('train.jsonl'), and set data.train"
_WITHOUT_EFFECT = ("shuffle", "with_format", "flatten_indices")
_MAP = ("function", "with_indices", "with_rank", "input_columns", "batched")
_ANY_ORDER = (
    *("batch_size", "drop_last_batch", "keep_in_memory", "load_from_cache_file", "cache_file_name", "cache_file_names"),
    *("writer_batch_size", "num_proc", "suffix_template", "new_fingerprint", "desc"),
)
"""Arguments of ``map`` and ``filter`` that change no row."""


class MappedRow(dict[str, Any]):
    """A row as ``map`` hands it out: joined with others it is still that row, whose removed columns do not come back."""

    def __or__(self, other: Any) -> MappedRow:  # type: ignore[override]
        return MappedRow({**self, **other})

    def copy(self) -> MappedRow:
        return MappedRow(self)


def mapped(function: Callable[..., Any], row: dict[str, Any], removed: Sequence[str] = (), **options: Any) -> Any:
    """What ``dataset.map(function, remove_columns=removed, fn_kwargs=options)`` makes of a row."""
    given = MappedRow(row)
    made = function(given, **options)
    if made is None:
        return row
    kept = {name: value for name, value in given.items() if name not in removed}
    if isinstance(made, MappedRow):
        made = {name: value for name, value in made.items() if name not in removed}
    return {**kept, **made}


class NotCarried(Exception):
    """Why a change of the rows can't stand in a module of its own."""


@dataclass
class DatasetSource:
    """What a dataset was before it was changed, the changes from the first to the last, and the split that was chosen."""

    loaded: ast.expr
    changes: list[ast.Call] = field(default_factory=list)
    split: str | None = None


def dataset_source(source: Source, node: ast.expr) -> DatasetSource:
    """Follow a dataset through its methods to what loaded it."""
    found, call = DatasetSource(node), source.follow(node)
    if isinstance(call, ast.IfExp) and source.value(call.orelse) is None:
        call = source.follow(call.body)  # … if training_args.eval_strategy != "no" else None
    while True:
        if isinstance(call, ast.Subscript) and (source.parsed(call.slice) or source.value(call.slice) is not UNKNOWN):
            found.split = None if source.parsed(call.slice) else source.value(call.slice)
            call = source.follow(call.value)
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and called(call) != "load_dataset":
            found.changes.insert(0, call)
            call = source.follow(call.func.value)
        else:
            found.loaded = call
            return found


def changed_rows(source: Source, changes: Sequence[ast.Call]) -> dict[str, Any]:
    """The changes as settings, and as the text of a module where some are code; others become remarks.

    One that can't be carried leaves out the code of all, since the others may build on it.
    """
    code = _Code(source)
    renamed: dict[str, str] = {}
    remarks: list[tuple[ast.Call, str]] = []
    for n, call in enumerate(changes):
        try:
            _add(source, call, called(call), code, renamed, earlier=changes[:n])
        except NotCarried as why:
            remarks.append((call, str(why)))
    for call, reason in remarks:
        shown = f"dataset.{called(call)}({', '.join(ast.unparse(a) for a in call.args)[:60]})"
        source.remark(call, shown, f"{reason}: {_BY_HAND}")
    if code.steps_are_code and not remarks:
        return {"rows": code.module(), "train_limit": code.limit}
    for call in changes if remarks else []:
        if called(call) in ("map", "filter") and not any(call is other for other, _ in remarks):
            source.remark(call, f"dataset.{called(call)}", "its code is left out, since it may build on what is")
    return {"columns": renamed, "train_limit": code.limit}


def _add(
    source: Source, call: ast.Call, name: str, code: _Code, renamed: dict[str, str], earlier: Sequence[ast.Call]
) -> None:
    """One change: statements of ``code``, and for renamed columns and a limit what settings say."""
    given = source.given(call, _MAP if name in ("map", "filter") else ("column_names", "new_column_name"))
    constants = [source.value(node) for node in call.args]
    if code.limit and name == "filter":
        raise NotCarried("it comes after the first rows were chosen, and data.train_limit counts what is left")
    if name in ("map", "filter"):
        code.add_call(name, call, given)
    elif name == "rename_column" and len(constants) == 2 and UNKNOWN not in constants:
        renamed[constants[1]] = renamed.pop(constants[0], constants[0])
        code.statements.append(f"row[{constants[1]!r}] = row.pop({constants[0]!r})")
    elif name == "rename_columns" and constants and isinstance(constants[0], dict):
        renamed |= {new: renamed.pop(old, old) for old, new in constants[0].items()}
        code.statements.append(f"row = {{{constants[0]!r}.get(name, name): value for name, value in row.items()}}")
    elif name in ("remove_columns", "select_columns") and (names := _names(source.value(given.get("column_names")))):
        kept = "not in" if name == "remove_columns" else "in"
        code.statements.append(f"row = {{name: value for name, value in row.items() if name {kept} {names!r}}}")
    elif name == "select" and call.args and (count := _first(source, call.args[0])):
        if any(called(other) == "shuffle" for other in earlier):
            how = "data.train_limit takes the first as they stand; shuffle the file for a mixture of them"
            source.remark(call, f"the first {count} of shuffled rows", how)
        code.limit = min(code.limit or count, count)
    elif name not in (*_WITHOUT_EFFECT, "remove_columns", "select_columns"):
        raise NotCarried("its rows can't be told without running it")


def _names(value: Any) -> tuple[str, ...] | None:
    several = [value] if isinstance(value, str) else value
    return tuple(several) if isinstance(several, list) and all(isinstance(name, str) for name in several) else None


def _first(source: Source, node: ast.expr) -> int | None:
    """n of ``range(n)``."""
    is_range = isinstance(node, ast.Call) and called(node) == "range" and len(node.args) == 1
    count = source.value(node.args[0]) if is_range else None  # type: ignore[attr-defined]
    return count if isinstance(count, int) else None


class _Code:
    """A module in the making: what the script's functions need, in the order of its need, and a function of a row."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._changed = {owner for owner, *_ in source.attributes} | set(_called_upon(source.tree))
        self._defined: dict[str, str] = {}
        self._calls = 0
        self.statements: list[str] = []
        self.limit: int | None = None

    @property
    def steps_are_code(self) -> bool:
        return self._calls > 0

    def add_call(self, name: str, call: ast.Call, given: dict[str, ast.expr]) -> None:
        """``map`` or ``filter`` with a function of one row."""
        source = self._source
        taken = ("function", "remove_columns", "fn_kwargs", *_ANY_ORDER)
        for argument, node in given.items():
            if argument not in taken and source.value(node) not in (None, False):
                raise NotCarried(f"its function is not one of a row alone ({argument} = {ast.unparse(node)})")
        options = source.value(given.get("fn_kwargs"))
        if options is UNKNOWN or "function" not in given:
            raise NotCarried("its arguments can't be told without running the script")
        self._calls += 1
        function = f"{name}_{self._calls}"
        self._define(function, f"{function} = {self._needed(given['function'])}")
        more = f", **{options!r}" if options else ""
        if name == "filter":
            self.statements += [f"if not {function}(dict(row){more}):", "    return None"]
            return
        self._define("mapped", "from e3rl.integrations.trl_rows import mapped")
        removed = self._removed(call, given.get("remove_columns"))
        self.statements.append(f"row = mapped({function}, row{removed}{more})")

    def _removed(self, call: ast.Call, columns: ast.expr | None) -> str:
        """The argument of `mapped` that names the columns which ``map`` removes."""
        value = self._source.value(columns)
        if value is None or value == []:
            return ""
        if names := _names(value):
            return f", removed={names!r}"
        of = columns.value if isinstance(columns, ast.Attribute) and columns.attr == "column_names" else None
        if of is not None and self._source.follow(of) is self._source.follow(call.func.value):  # type: ignore[attr-defined]
            return ", removed=tuple(row)"
        raise NotCarried("the columns that it removes can't be told without running the script")

    def _needed(self, node: ast.AST) -> str:
        """The text of an expression or definition, after what it needs has been defined."""
        if any(isinstance(n, ast.Call) and called(n).startswith("parse_") for n in ast.walk(node)):
            raise NotCarried("its code needs what the script reads from its command line")
        text = ast.unparse(node)
        free = _free_names(text)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in free:
                self._bring(inner)
        return text

    def _bring(self, name: ast.Name) -> None:
        """Define what a name of the script stands for where it is used."""
        if self._source.parsed(name):
            raise NotCarried(f"its code needs '{name.id}', which comes from the command line")
        imports = sorted({text for alias, text in _imports(self._source.tree) if alias == name.id})
        meanings = [*imports, *self._source.meanings(name)]
        if not meanings and hasattr(builtins, name.id):
            return
        meaning = meanings[0] if len(meanings) == 1 and name.id not in (FUNCTION, *self._changed) else None
        if meaning is None:
            raise NotCarried(f"its code needs '{name.id}', whose value only running the script would tell")
        if isinstance(meaning, str):
            self._define(name.id, meaning)
        elif self._defined.get(name.id) == "" and isinstance(meaning, ast.expr):
            raise NotCarried(f"'{name.id}' is made from its own value")
        elif name.id not in self._defined:
            self._defined[name.id] = ""  # functions may call each other
            assigned = f"{name.id} = " if isinstance(meaning, ast.expr) else ""
            made = assigned + self._needed(meaning)
            del self._defined[name.id]
            self._define(name.id, made)

    def _define(self, name: str, text: str) -> None:
        if self._defined.setdefault(name, text) not in (text, ""):
            raise NotCarried(f"'{name}' means several things in its code")

    def module(self) -> str:
        """The module's text. Its last function is the one to name."""
        imports = sorted({text for text in self._defined.values() if text.startswith(("import ", "from "))})
        others = [text for text in self._defined.values() if text not in imports]
        body = "\n".join(f"    {line}" for line in (*self.statements, "return row"))
        last = f'def {FUNCTION}(row):\n    """The row as the script\'s dataset has it; None: left out."""\n{body}'
        return "\n\n\n".join([f'"""{_TITLE}"""\n\n' + "\n".join(imports), *others, last]) + "\n"


def _free_names(text: str) -> set[str]:
    """Names that a piece of code needs from around it. NotCarried where it changes what is around it."""
    try:
        table = symtable.symtable(text, "script", "exec")
    except SyntaxError:
        raise NotCarried("its code changes a variable of a function around it") from None
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
    found: set[str] = set()
    for part in _tables(table):
        for symbol in part.get_symbols():
            if symbol.is_declared_global() and symbol.is_assigned():
                raise NotCarried(f"its code changes the variable '{symbol.get_name()}'")
            if symbol.is_referenced() and (symbol.is_global() or part is table):
                found.add(symbol.get_name())
    return found - own


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _tables(inner)


def _called_upon(tree: ast.Module) -> Iterator[str]:
    """Names whose methods are called for what they change: ``parser.add_argument(...)``, ``random.seed(0)``."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Attribute)
        ):
            owner: ast.expr = node.value.func
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name):
                yield owner.id


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each imported name, and the statement that imports it alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"from {'.' * node.level}{node.module or ''} " if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield name, f"{start}import {alias.name}{f' as {alias.asname}' if alias.asname else ''}"
