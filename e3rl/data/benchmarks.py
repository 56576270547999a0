"""The benchmarks of the papers by name, from a directory of local files or from the hub; none comes with the package.

The number of rows must be the benchmark's own; any other number is an error. The content is compared with the digests
below; a copy with other content is still used, and reported (`Loaded.known` is False).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3rl.data.readers import READERS, Row, read_dataset, read_file
from e3rl.data.rows import plain_text
from e3rl.errors import UserError
from e3rl.types import Problem


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how many problems it has, what its files are called, where the hub has it, and its content's digest."""

    count: int
    title: str
    files: tuple[str, ...]
    hub: str
    split: str
    digest: str


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        30,
        "AIME 2024",
        ("aime24", "aime_2024", "aime2024"),
        "HuggingFaceH4/aime_2024",
        "train",
        "cd4f3ab13058e5c5968fefe11da34c750368142a715a080fb484460501857396",
    ),
    "aime25": Benchmark(
        30,
        "AIME 2025",
        ("aime25", "aime_2025", "aime2025"),
        "MathArena/aime_2025",
        "train",
        "ee09fa324796c63ad3df2cd0dd551a82f9e08151a697e77581866e142e7d8fc1",
    ),
    "aime26": Benchmark(
        30,
        "AIME 2026",
        ("aime26", "aime_2026", "aime2026"),
        "MathArena/aime_2026",
        "train",
        "3031ef08d2d5a13621e9c88860a6d2243365f4aa6f6c9cb724105db06e1e401a",
    ),
    "amc23": Benchmark(
        40,
        "AMC 2023",
        ("amc23", "amc_2023", "amc2023"),
        "math-ai/amc23",
        "test",
        "3c7d26ca6e16f84faaa5b3cb066bdec74953ae3b3ca1c636f5f18d4391e7c0e2",
    ),
    "math500": Benchmark(
        500,
        "MATH 500",
        ("math500", "math_500", "MATH-500"),
        "HuggingFaceH4/MATH-500",
        "test",
        "4be0dd21829873548f570d8e06af3cf3f99fd7684db0204dcc1e4714579950c1",
    ),
    "minerva": Benchmark(
        272,
        "Minerva Math",
        ("minerva_math", "minerva"),
        "math-ai/minervamath",
        "test",
        "dbfb53900522339de695f6fc077541f12137801d346c6460e5684f9e2046a1e3",
    ),
    "olympiadbench": Benchmark(
        675,
        "OlympiadBench",
        ("olympiadbench", "olympiad_bench"),
        "zwhe99/simplerl-OlympiadBench",
        "test",
        "e3d6184a32b6c54f1012d18be67955e21bf84843ec14c65d239d9ba5c9e56f99",
    ),
    "gsm8k": Benchmark(
        1319,
        "GSM8K",
        ("gsm8k_test", "gsm8k"),
        "openai/gsm8k:main",
        "test",
        "acdb7e4a953a9253fed71650ea6adb7e9f3f519b0bee98fb52b476ebe2f40900",
    ),
}
"""The benchmarks of E3RL's table 1 and ERPO's tables, and GSM8K."""

_PROMPTS = ("problem", "question", "prompt")
_ANSWERS = ("answer", "final_answer", "expected_answer", "solution")
_IDS = ("id", "unique_id", "problem_idx", "ID")


@dataclass(frozen=True)
class Loaded:
    """A benchmark's problems, where they came from, and whether they are the copy that the digest was taken from."""

    name: str
    problems: tuple[Problem, ...]
    source: str
    digest: str
    known: bool


def load_benchmark(name: str, directory: str = "") -> Loaded:
    """The problems of a benchmark: from ``directory`` if given, else from the hub."""
    benchmark = BENCHMARKS[name]
    source, rows = _local(name, Path(directory)) if directory else _remote(benchmark)
    problems: list[Problem] = []
    ids: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        problem = _problem(name, number, where, row)
        if problem.id in ids:
            raise UserError(f"{where}: id '{problem.id}' is already the id of {ids[problem.id]}; ids must be unique")
        ids[problem.id] = where
        problems.append(problem)
    if len(problems) != benchmark.count:
        raise UserError(
            f"{source}: {benchmark.title} has {benchmark.count} problems, and this holds {len(problems)}. Figures on it "
            "would not be those of the benchmark: use a whole copy, or load the file by its path for an evaluation of "
            "your own"
        )
    digest = content_digest(problems)
    return Loaded(name, tuple(problems), source, digest, digest == benchmark.digest)


def _local(name: str, directory: Path) -> tuple[str, Iterable[Row]]:
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory} to look for benchmarks in (--data-dir)")
    wanted = [directory / f"{stem}{extension}" for stem in BENCHMARKS[name].files for extension in READERS]
    found = next((path for path in wanted if path.is_file()), None)
    if found is None:
        there = sorted(
            other
            for other, b in BENCHMARKS.items()
            if any((directory / f"{s}{e}").is_file() for s in b.files for e in READERS)
        )
        raise UserError(
            f"{directory} has no file for '{name}': expected {wanted[0].name}. "
            f"Benchmarks found there: {', '.join(there) or 'none'}"
        )
    return str(found), read_file(found)


def _remote(benchmark: Benchmark) -> tuple[str, Iterable[Row]]:
    return benchmark.hub, _explained(read_dataset(benchmark.hub, benchmark.split), benchmark)


def _explained(rows: Iterable[Row], benchmark: Benchmark) -> Iterable[Row]:
    try:
        yield from rows
    except UserError as error:
        raise UserError(
            f"{error} A benchmark can be read from a local file too: --data-dir DIR, or data.directory, with "
            f"{benchmark.files[0]}.jsonl in it"
        ) from None


def _problem(name: str, number: int, where: str, row: Mapping[str, Any]) -> Problem:
    prompt_column, answer_column = (_column(row, names, where, name) for names in (_PROMPTS, _ANSWERS))
    prompt = plain_text(row[prompt_column], f"{where}: {prompt_column}")
    answer = _answer(name, row[answer_column], f"{where}: {answer_column}")
    id_column = next((c for c in _IDS if row.get(c) is not None), None)
    id_ = plain_text(row[id_column], f"{where}: {id_column}") if id_column else None
    columns = {str(k): v for k, v in row.items() if k not in (prompt_column, id_column, "answer")}
    if not prompt or not answer:
        raise UserError(f"{where}: the {'problem' if not prompt else 'answer'} is empty")
    return Problem(id_ or f"{name}-{number}", prompt, answer, columns)


def _column(row: Mapping[str, Any], names: tuple[str, ...], where: str, name: str) -> str:
    found = next((c for c in names if row.get(c) not in (None, "")), None)
    if found is None:
        raise UserError(
            f"{where}: '{name}' needs one of the columns {', '.join(names)}; this row has {', '.join(map(str, row)) or 'none'}"
        )
    return found


def _answer(name: str, value: Any, where: str) -> str:
    """The gold answer, from any usual form: a number, a list, a worked solution, text in dollar signs."""
    if isinstance(value, list | tuple):
        if not value:
            raise UserError(f"{where}: the list of answers is empty")
        return ", ".join(_answer(name, entry, where) for entry in value)
    text = plain_text(value, where) or ""
    if "####" in text:  # GSM8K: a worked solution, then the answer
        return text.rpartition("####")[2].strip().replace(",", "")
    if r"\boxed" in text:
        from e3rl.rewards.answers import last_box

        text = last_box(text) or ""
    text = text.strip()
    if len(text) > 2 and text.startswith("$") and text.endswith("$") and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    if name.startswith(("aime", "amc")):  # whole numbers, written 033 or 27.0 in some copies
        text = re.sub(r"^0+(?=\d)|\.0+$", "", text)
    return text


def content_digest(problems: Iterable[Problem]) -> str:
    """SHA-256 over statements and answers. Ignores order, case, spaces and punctuation, which differ between copies."""
    lines = sorted(normalised(str(p.prompt)) + "=" + "".join((p.answer or "").split()) for p in problems)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def normalised(text: str) -> str:
    """Only the letters and digits, in lower case, with one space between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
