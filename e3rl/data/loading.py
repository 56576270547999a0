"""`load_problems`: any source of rows becomes a list of checked problems."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, TypeVar

from e3rl.config import DataConfig
from e3rl.data.benchmarks import BENCHMARKS, load_benchmark
from e3rl.data.readers import READERS, Row, looks_like_hub_id, read_dataset, read_file
from e3rl.data.rows import has_column, to_problem, transformed
from e3rl.errors import UserError, unknown
from e3rl.types import Problem

Split = Literal["train", "eval"]
_T = TypeVar("_T")

_ENCODED_FORMATS = (".csv", ".parquet")
_DEFAULT_COLUMNS = {f.name: f.default for f in fields(DataConfig)}


def load_problems(source: str, *, config: DataConfig, split: Split) -> list[Problem]:
    """The problems of a file, a directory, a hub dataset or lab families (``lab:FAMILY[:LEVEL]``, several joined by ``+``).

    ``split`` picks a lab family's half, names the split of a hub dataset through ``config``, and says whether
    ``config.train_limit`` applies; a file is taken whole.
    """
    limit = config.train_limit if split == "train" else 0
    if source.startswith("lab:"):
        return _lab_problems(source, split, limit)
    if source in BENCHMARKS:
        return list(load_benchmark(source, config.directory).problems)
    rows = transformed(rows_of(source, config, split), config)
    problems = _to_problems(itertools.islice(rows, limit) if limit else rows, source, config)
    if not problems:
        none = "data.transform leaves no rows" if config.transform else "holds no rows"
        raise UserError(f"{source}: {none}; there is nothing to {'train on' if split == 'train' else 'evaluate'}")
    return problems


def training_problems(config: DataConfig) -> dict[str, list[Problem]]:
    """The training problems by source. With several sources, each problem's id begins with its source."""
    found = {source: load_problems(source, config=config, split="train") for source in config.sources}
    if len(found) == 1:
        return found
    return {source: [replace(p, id=f"{source}/{p.id}") for p in problems] for source, problems in found.items()}


AUTO = "auto"
"""In data.eval: the held-out half of the lab families that are trained on."""


def held_out_sources(config: DataConfig) -> tuple[str, ...]:
    """The sources to evaluate on. An empty data.eval means none; its default is 'auto' alone."""
    if len(set(config.eval)) < len(config.eval):
        raise UserError(f"data.eval names a source twice: {', '.join(config.eval)}")
    halves = tuple(source for source in config.sources if source.startswith("lab:"))
    named = [halves if source == AUTO else (source,) for source in config.eval]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(named)))


def spread(problems: Sequence[_T], limit: int) -> list[_T]:
    """``limit`` of the problems (or of their prompts), evenly spread: data are often sorted by difficulty. 0 keeps all."""
    count = min(limit or len(problems), len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def rows_of(source: str, config: DataConfig, split: Split) -> Iterable[Row]:
    """The rows of a file, a directory or a hub dataset, each with its location for error messages."""
    path = Path(source)
    if path.suffix.lower() in READERS and not path.is_dir():
        return read_file(path)
    if path.is_file():
        raise UserError(f"{source}: unknown extension '{path.suffix}'; known are {', '.join(READERS)}")
    if not path.exists() and difflib.get_close_matches(source.lower(), BENCHMARKS, n=1, cutoff=0.75):
        raise unknown("benchmark", source, BENCHMARKS)
    if path.is_dir() or looks_like_hub_id(source):
        return read_dataset(source, config.train_split if split == "train" else config.eval_split)
    raise UserError(
        f"no such data: '{source}' is not a file, a directory, a benchmark or a hub id (OWNER/NAME or "
        f"OWNER/NAME:SUBSET); lab problems are written lab:FAMILY[:LEVEL]. Benchmarks: {', '.join(BENCHMARKS)}"
    )


def _to_problems(rows: Iterable[Row], source: str, config: DataConfig) -> list[Problem]:
    encoded = Path(source).suffix.lower() in _ENCODED_FORMATS
    problems: list[Problem] = []
    places: dict[str, str] = {}
    seen = {"answer_column": False, "id_column": False}
    for number, (where, row) in enumerate(rows):
        problem = to_problem(row, config, where, number, encoded=encoded)
        if problem.id in places:
            raise UserError(f"{where}: id '{problem.id}' is already the id of {places[problem.id]}; ids must be unique")
        places[problem.id] = where
        problems.append(problem)
        for setting in seen:
            seen[setting] |= has_column(row, getattr(config, setting))
    _check_named_columns(seen, bool(problems), source, config)
    return problems


def _check_named_columns(seen: dict[str, bool], any_rows: bool, source: str, config: DataConfig) -> None:
    """The default names of optional columns may be absent; a name that the user chose may not."""
    for setting, found in seen.items():
        name = getattr(config, setting)
        if any_rows and not found and name != _DEFAULT_COLUMNS[setting]:
            raise UserError(f"{source}: no row has the column '{name}' that data.{setting} names")


def _lab_problems(source: str, split: Split, limit: int) -> list[Problem]:
    """The problems of one family, or of several (``lab:chain:3+lab:path:2``) among which the limit is divided evenly."""
    from e3rl.lab import problems as lab

    names = source.split("+")
    if 0 < limit < len(names):
        raise UserError(
            f"data.train_limit = {limit} leaves nothing for some of {source}: it must be at least {len(names)}"
        )
    part: lab.Split = "train" if split == "train" else "heldout"
    shares = [limit // len(names) + (i < limit % len(names)) or None for i in range(len(names))]
    return [problem for name, share in zip(names, shares, strict=True) for problem in lab.load(name, part, share)]
