"""Reads the settings of a TRL run, GRPO or RLOO, from YAML, JSON, a command line, or a script."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from e3rl.errors import UserError

FROM_COMMAND_LINE = "give its settings after '--', as on a command line; TRL's defaults stand for the others"
"""The remark on a script's settings that it reads from its command line."""
HOW_LOADED = ("dtype", "torch_dtype", "attn_implementation", "device_map", "use_cache")
"""Arguments of from_pretrained that are a setting here, or without effect on what is computed."""
RLOO_ONLY = frozenset(("normalize_advantages", "reward_clip_range"))
"""Settings that RLOOConfig has and GRPOConfig has not."""
_REWARDS = {"get_soft_overlong_punishment": "overlong"}


@dataclass(frozen=True)
class Arguments:
    """TRL's settings by TRL's names, and remarks on what could not be read.

    ``reward_funcs`` among them are already in e3rl's form, ``module:name``.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    rloo: bool = False
    """Whether they are an RLOOTrainer's, whose defaults are others; of a GRPOTrainer if not."""

    def updated(self, other: Arguments) -> Arguments:
        """These settings, overridden by ``other``."""
        return Arguments({**self.values, **other.values}, (*self.remarks, *other.remarks), self.rloo or other.rloo)


def read_arguments(source: Sequence[str]) -> Arguments:
    """``source``: a file, then arguments that override it; or only arguments, in one string or in several."""
    first, *rest = source
    if first.startswith("-") or first.split()[0] in ("trl", "accelerate", "python", "python3"):
        words = [word for part in source for word in (shlex.split(part) if " " in part else [part])]
        return read_command_line(words)
    found = read_file(Path(first))
    if rest:  # a script that parses its command line gets it here
        found = replace(found, remarks=tuple(r for r in found.remarks if FROM_COMMAND_LINE not in r))
    return found.updated(read_command_line(rest))


def read_file(path: Path) -> Arguments:
    """The settings of a YAML or JSON file, as TRL's command line takes it, or of a script."""
    from e3rl.integrations.trl_scripts import read_script

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
    named = {str(k): v for k, v in values.items()}
    return replace(_with_reward_names(named), rloo=not RLOO_ONLY.isdisjoint(named))


def read_command_line(words: Sequence[str]) -> Arguments:
    """``--name value``, ``--name=value``, ``--flag``, ``--no_flag``; words before the first option are the command.

    The command `trl rloo` makes them settings of RLOO.
    """
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
    command = itertools.takewhile(lambda word: not word.startswith("--"), words)
    return found.updated(replace(_with_reward_names(values), rloo="rloo" in command))


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    starts = [i for i, word in enumerate(words) if word.startswith("--") and len(word) > 2]
    for start, end in itertools.pairwise([*starts, len(words)]):
        name, equals, value = words[start][2:].partition("=")
        yield name.replace("-", "_"), ([value] if equals else []) + list(words[start + 1 : end])


def literal(text: Any) -> Any:
    """The value of a command-line word: number, boolean or JSON; anything else stays text."""
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
    return Arguments({**values, "reward_funcs": [reward_name(str(name)) for name in several]})


def reward_name(name: str) -> str:
    """A reward of TRL's command line, in e3rl's form; a model's name or path, which has a slash, as it is."""
    if "/" in name:
        return name
    module, dot, function = name.rpartition(".")
    return f"{module}:{function}" if dot else _REWARDS.get(name, f"trl.rewards:{name}")
