"""Reads the settings of a TRL GRPO run from wherever they are written: YAML, JSON, a command line, a Python script.

A script is parsed, never run.
"""

from __future__ import annotations

import ast
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e3rl.errors import UserError

_REWARDS = {"get_soft_overlong_punishment": "overlong"}
_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
}


@dataclass(frozen=True)
class Arguments:
    """TRL's settings by TRL's names, and remarks on what could not be read.

    ``reward_funcs`` among them are already in e3rl's form, ``module:name``.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def updated(self, other: Arguments) -> Arguments:
        """These with ``other`` laid over them."""
        return Arguments({**self.values, **other.values}, (*self.remarks, *other.remarks))


def read_arguments(source: Sequence[str]) -> Arguments:
    """``source``: a file, then arguments that override it; or arguments alone, in one string or in several."""
    first, *rest = source
    if first.startswith("-") or first.split()[0] in ("trl", "accelerate", "python", "python3"):
        words = [word for part in source for word in (shlex.split(part) if " " in part else [part])]
        return read_command_line(words)
    return read_file(Path(first)).updated(read_command_line(rest))


def read_file(path: Path) -> Arguments:
    """The settings of a YAML or JSON file, as TRL's command line takes it, or of a script."""
    readers = {".py": read_script, ".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_yaml}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a .yaml, .json or .py file, or arguments after --")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    return readers[path.suffix](text, path)


def _read_yaml(text: str, path: Path) -> Arguments:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold settings by name")
    return _with_reward_names({str(k): v for k, v in values.items()})


def read_command_line(words: Sequence[str]) -> Arguments:
    """``--name value``, ``--name=value``, ``--flag``, ``--no_flag``; words before the first option are the command."""
    values: dict[str, Any] = {}
    found = Arguments()
    for name, given in _options(words):
        if name == "config" and given:
            found = read_file(Path(given[0]))
        elif not given:
            values |= {name.removeprefix("no_"): False} if name.startswith("no_") else {name: True}
        else:
            literals = [literal(g) for g in given]
            values[name] = literals[0] if len(literals) == 1 else literals
    return found.updated(_with_reward_names(values))


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    starts = [i for i, word in enumerate(words) if word.startswith("--") and len(word) > 2]
    for start, end in itertools.pairwise([*starts, len(words)]):
        name, equals, value = words[start][2:].partition("=")
        yield name.replace("-", "_"), ([value] if equals else []) + list(words[start + 1 : end])


def literal(text: Any) -> Any:
    """What a value on a command line stands for; what is no number, truth value or JSON stays text."""
    if not isinstance(text, str):
        return text
    words = {"None": None, "null": None, "true": True, "True": True, "false": False, "False": False}
    if text in words:
        return words[text]
    for read in (int, float, json.loads):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _with_reward_names(values: dict[str, Any]) -> Arguments:
    """TRL names reward functions by its own table or by a dotted path."""
    names = values.get("reward_funcs")
    if names is None:
        return Arguments(values)
    several = [names] if isinstance(names, str) else list(names)
    return Arguments({**values, "reward_funcs": [_reward_name(str(name)) for name in several]})


def _reward_name(name: str) -> str:
    module, dot, function = name.rpartition(".")
    return f"{module}:{function}" if dot else _REWARDS.get(name, f"trl.rewards:{name}")


def read_script(text: str, path: Path) -> Arguments:
    """The literal keyword arguments of GRPOConfig(...) and of the calls around it."""
    try:
        script = _Script(ast.parse(text), path)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno} is not valid Python: {error.msg}") from None
    configs = script.calls("GRPOConfig")
    if len(configs) != 1:
        raise UserError(f"{path} has {len(configs)} calls of GRPOConfig(...); exactly one can be converted")
    values = script.keywords(configs[0])
    for call in script.calls("LoraConfig")[:1]:
        lora = script.keywords(call)
        values |= {"use_peft": True, **{_LORA[k]: v for k, v in lora.items() if k in _LORA}}
    for call in script.calls("load_dataset")[:1]:
        values |= script.dataset(call)
    for call in script.calls("GRPOTrainer")[:1]:
        values |= script.trainer(call)
    return Arguments(values, tuple(script.remarks))


class _Script:
    """A parsed script, its constants, and remarks on what is no literal."""

    def __init__(self, tree: ast.Module, path: Path) -> None:
        self._tree, self._path = tree, path
        self.remarks: list[str] = []
        self._constants: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                known, value = self._value(node.value)
                if known:
                    self._constants[node.targets[0].id] = value
        self._functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        self._imports = {
            alias.asname or alias.name: f"{node.module}:{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            for alias in node.names
        }

    def calls(self, name: str) -> list[ast.Call]:
        """Calls of ``name``, whatever it is reached through."""
        found = [n for n in ast.walk(self._tree) if isinstance(n, ast.Call)]
        return [c for c in found if getattr(c.func, "id", getattr(c.func, "attr", None)) == name]

    def keywords(self, call: ast.Call) -> dict[str, Any]:
        """Keyword arguments that are literals, or constants of the module."""
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            known, value = self._value(keyword.value)
            if keyword.arg is not None and known:
                values[keyword.arg] = value
            else:
                name = keyword.arg or "**" + ast.unparse(keyword.value)
                self.remarks.append(
                    f"{name}: line {keyword.value.lineno} computes it, and scripts are not run; set it by hand"
                )
        return values

    def dataset(self, call: ast.Call) -> dict[str, Any]:
        """Name, subset and split of load_dataset(...)."""
        given = dict(zip(("dataset_name", "dataset_config"), call.args, strict=False))
        for keyword in call.keywords:
            if keyword.arg == "split":
                given["dataset_train_split"] = keyword.value
        read = {name: self._value(node) for name, node in given.items()}
        return {name: value for name, (known, value) in read.items() if known}

    def trainer(self, call: ast.Call) -> dict[str, Any]:
        """Model and reward functions of GRPOTrainer(...)."""
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg == "model":
                known, value = self._value(keyword.value)
                if known and isinstance(value, str):
                    values["model_name_or_path"] = value
                else:
                    self.remarks.append("model: it is not named by a literal; set model.path by hand")
            elif keyword.arg == "reward_funcs":
                several = keyword.value.elts if isinstance(keyword.value, ast.List | ast.Tuple) else [keyword.value]
                values["reward_funcs"] = [name for node in several if (name := self._function(node))]
        return values

    def _function(self, node: ast.expr) -> str | None:
        name = node.id if isinstance(node, ast.Name) else None
        if name in self._functions:
            if not any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in self._tree.body):
                self.remarks.append(
                    f"reward function {name}: importing {self._path} would run the training in it; move the function "
                    "to a file of its own, or the training under if __name__ == '__main__'"
                )
            return f"{self._path}:{name}"
        if name in self._imports:
            return self._imports[name]
        self.remarks.append(f"reward_funcs: {ast.unparse(node)} is no plain function; add it to rewards.functions")
        return None

    def _value(self, node: ast.expr) -> tuple[bool, Any]:
        if isinstance(node, ast.Name) and node.id in self._constants:
            return True, self._constants[node.id]
        try:
            return True, ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return False, None
