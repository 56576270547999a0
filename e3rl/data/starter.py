"""A starter recipe from a model's outline and a dataset: columns, lengths, segments, and the reason for each choice.

Reads the data and the tokenizer; loads no weights. The choices are simple rules over measured values.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from e3rl.config import Config, DataConfig
from e3rl.data.loading import load_problems, rows_of, spread
from e3rl.data.prompts import render_prompts
from e3rl.data.rows import PROMPT_NAMES, lookup
from e3rl.errors import UserError
from e3rl.models import Outline
from e3rl.rewards.grading import grade_all
from e3rl.rewards.pool import ProcessPool
from e3rl.sections import toml_value
from e3rl.types import Problem

ANSWERS = (
    "answer",
    "final_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "gold",
    "expected_answer",
    "target",
    "result",
    "expected",
)
SOLUTIONS = ("solution", "reasoning", "rationale", "generated_solution", "response", "output", "completion")
LOOKED_AT = 200  # rows read to identify the columns
MEASURED = 512  # problems, evenly spread, whose lengths are measured
SEGMENTS = 8  # the paper's number
SHORTEST_SEGMENT = 12  # tokens; shorter segments hold no reasoning step
UNKNOWN_LENGTH = 1024  # tokens of a response if the data don't show how long responses are
DEFAULT_PROMPTS = 16
FIRST_STEPS = 20
FEWEST_STEPS = 4  # of an epoch
_TRIED_ANSWERS = 100
_BOXED = re.compile(r"\\boxed\s*\{|####")


@dataclass(frozen=True)
class Choice:
    """One setting of the recipe. ``why`` becomes its comment; empty: no comment."""

    section: str
    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Columns:
    """The column for each purpose; '' if there is none."""

    prompt: str
    answer: str
    solution: str
    id: str
    found: tuple[str, ...]


def percentile(values: Sequence[int], share: float) -> int:
    """The smallest value that ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def find_columns(rows: Sequence[Mapping[str, Any]], source: str) -> Columns:
    """The columns of prompt, answer, solution and id, found by their names and contents."""
    names = tuple(dict.fromkeys(str(name) for row in rows for name in row))
    prompt = next((n for n in ("prompt", *PROMPT_NAMES) if _all(rows, n, _is_prompt)), "")
    if not prompt:
        raise UserError(
            f"{source}: no column looks like a prompt (a text, or a list of chat messages that does not end with the "
            f"assistant). Columns found: {', '.join(names) or 'none'}. Write a recipe by hand with data.prompt_column"
        )
    answer = next((n for n in ANSWERS if n != prompt and _all(rows, n, _is_answer)), "")
    solution = next((n for n in SOLUTIONS if n not in (prompt, answer) and _all(rows, n, _is_text)), "")
    if not answer and solution and _all(rows, solution, lambda v: bool(_BOXED.search(v))):
        answer = solution
    ids = [str(row.get("id")) for row in rows if row.get("id") is not None]
    id_ = "id" if len(ids) == len(rows) and len(set(ids)) == len(ids) else ""
    return Columns(prompt, answer, solution, id_, names)


def _all(rows: Sequence[Mapping[str, Any]], column: str, fits: Callable[[Any], bool]) -> bool:
    return bool(rows) and all(fits(lookup(row, column)) for row in rows)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(m, Mapping) for m in value) and value[-1].get("role") != "assistant"
    return _is_text(value)


def _is_answer(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int | float) and not isinstance(value, bool))


def held_out_beside(source: str) -> str:
    """The test split beside ``source``, found by its file name; '' if there is none."""
    path = Path(source)
    if not path.is_file():
        return ""
    for word in ("test", "eval", "validation", "val", "heldout", "held_out"):
        for name in (path.name.replace("train", word), f"{path.stem}_{word}{path.suffix}", f"{word}{path.suffix}"):
            other = path.with_name(name)
            if name != path.name and other.is_file():
                return str(other)
    return ""


@dataclass(frozen=True)
class Lengths:
    """Token counts of prompts as the model sees them, and of worked answers ('solutions') if the data have any."""

    prompts: tuple[int, ...]
    solutions: tuple[int, ...]
    solution_column: str


def measure(problems: Sequence[Problem], outline: Outline, config: DataConfig, columns: Columns | None) -> Lengths:
    """Lengths of evenly spread problems."""
    chosen = spread(problems, MEASURED)
    prompts = render_prompts(chosen, outline.tokenizer, config, context_limit=2**31, completion_limit=1)
    column = columns.solution if columns else "solution"
    texts = [lookup(p.columns, column) for p in chosen] if column else []
    if not column and columns and columns.answer:  # a worked answer that ends with the answer, as GSM8K has it
        column, texts = columns.answer, [p.answer for p in chosen]
        texts = texts if any(_BOXED.search(t or "") for t in texts) else []
    encode = outline.tokenizer.encode
    solutions = [len(encode(t, add_special_tokens=False)) for t in texts if isinstance(t, str) and t.strip()]
    return Lengths(tuple(len(p.ids) for p in prompts), tuple(solutions), column)


def response_length(lengths: Lengths, outline: Outline, asked: int = 0) -> tuple[int, str]:
    """The response limit in tokens, and the reason for it."""
    room = outline.context_length - max(lengths.prompts) - 1
    if room < SHORTEST_SEGMENT:
        raise UserError(
            f"the longest prompt has {max(lengths.prompts)} tokens and the model's context {outline.context_length}: "
            "nothing is left for a response"
        )
    if asked:
        if asked > room:
            raise UserError(f"--length {asked}: the context leaves {room} tokens for a response")
        return asked, "as --length says"
    if lengths.solutions:
        usual = percentile(lengths.solutions, 0.95)
        wanted = max(2 * SHORTEST_SEGMENT, 2 * usual)
        why = f"twice what 95 % of the data's own solutions need ({usual} tokens of '{lengths.solution_column}')"
    else:
        wanted = UNKNOWN_LENGTH
        why = (
            "a guess: the data hold no worked answers to measure; raise it if the health lines say that answers are cut"
        )
    if "enable_thinking" in str(getattr(outline.tokenizer, "chat_template", "") or ""):
        wanted = max(wanted, 4096)
        why = "the model thinks before it answers (its chat template has enable_thinking), so answers are long; a guess"
    if wanted > room:
        return room, f"what the context of {outline.context_length} leaves beside the longest prompt measured"
    return wanted, why


def segments_of(limit: int) -> tuple[int, int]:
    """Segment length and number of segments of a response of up to ``limit`` tokens."""
    segments = max(1, min(SEGMENTS, limit // SHORTEST_SEGMENT))
    return math.ceil(limit / segments), segments


def rollout_choices(lengths: Lengths, outline: Outline, asked: int) -> list[Choice]:
    """Segment length and number of segments, and the response limit if it isn't their product."""
    limit, why = response_length(lengths, outline, asked)
    length, segments = segments_of(limit)
    count = (
        "the paper's number"
        if segments == SEGMENTS
        else f"fewer than the paper's {SEGMENTS}: shorter segments hold no step"
    )
    choices = [
        Choice("rollout", "segment_length", length, f"responses of up to {limit} tokens: {why}"),
        Choice("rollout", "max_segments", segments, count),
    ]
    if length * segments > limit:
        choices.append(Choice("rollout", "max_completion_length", limit))
    return choices


def starter_choices(
    source: str, outline: Outline, *, reward: str = "", length: int = 0
) -> tuple[list[str], list[Choice]]:
    """A description of the data, and the choices that follow from it. UserError for unusable rows."""
    columns, config = look_at(source, DataConfig())
    problems = load_problems(source, config=config, split="train")
    lengths = measure(problems, outline, config, columns)
    prompts = lengths.prompts
    title = [
        f"A starting point for {outline.source} on {source}, made by e3rl init.",
        f"{len(problems)} problem{'s' * (len(problems) != 1)}; prompts have {percentile(prompts, 0.5)} tokens (median), "
        f"at most {max(prompts)}" + (f" among {len(prompts)} measured." if len(prompts) < len(problems) else "."),
        f"Erasure settings depend on the model: 'e3rl calibrate {outline.source} {source}' chooses them.",
    ]
    if not held_out_beside(source) and not source.startswith("lab:"):
        title.append("Nothing is evaluated: no file of held-out problems was found by its name. data.eval names one.")
    choices = [
        *data_choices(source, columns),
        *rollout_choices(lengths, outline, length),
        reward_choice(reward, source, columns, problems),
        *train_choices(len(problems)),
    ]
    return title, choices


def data_choices(source: str, columns: Columns | None) -> list[Choice]:
    """Source, columns, and held-out problems if there is a test split beside it."""
    choices, default = [Choice("data", "train", source)], DataConfig()
    if columns is not None:
        among = f"of the columns {', '.join(columns.found)}"
        for key, found in (("prompt_column", columns.prompt), ("answer_column", columns.answer)):
            if found and found != getattr(default, key):
                choices.append(Choice("data", key, found, among))
        if columns.solution and columns.solution != default.solution_column:
            choices.append(Choice("data", "solution_column", columns.solution, "only objective 'sft' reads it"))
    if held_out := held_out_beside(source):
        choices.append(Choice("data", "eval", [held_out], "held out, by its name"))
    if held_out or source.startswith("lab:"):
        choices.append(Choice("eval", "limit", 64, "held-out problems evaluated before and after"))
    return choices


def reward_choice(asked: str, source: str, columns: Columns | None, problems: Sequence[Problem]) -> Choice:
    """The reward function that fits the reference answers."""
    if asked:
        return Choice("rewards", "functions", [asked])
    if source.startswith("lab:"):
        return Choice("rewards", "functions", ["lab"])
    if not columns or not columns.answer:
        return Choice("rewards", "functions", ["my_rewards.py:reward"], "no column with answers: write this function")
    tried = [p.answer or "" for p in spread(problems, _TRIED_ANSWERS)]
    pool = ProcessPool(1, 5.0)
    try:
        right = sum(grade.correct is True for grade in grade_all([(a, a) for a in tried], pool))
    finally:
        pool.close()
    told = f"it grades {right} of {len(tried)} reference answers as right when they are given as responses"
    return Choice("rewards", "functions", ["math"], told)


def train_choices(problems: int) -> list[Choice]:
    """A short first run."""
    prompts = min(DEFAULT_PROMPTS, max(1, problems // FEWEST_STEPS))
    epoch = max(1, problems // prompts)
    why = (
        f"a short first run; an epoch has {epoch} step{'s' * (epoch > 1)}, and without this line the run has two epochs"
    )
    choices = [Choice("train", "steps", FIRST_STEPS, why)]
    if prompts != DEFAULT_PROMPTS:
        choices.append(Choice("train", "prompts_per_step", prompts, "few, so that an epoch has several steps"))
    return choices


def look_at(source: str, config: DataConfig) -> tuple[Columns | None, DataConfig]:
    """The columns of a source (None for lab problems), and the data settings that select them."""
    if source.startswith("lab:"):
        return None, config
    columns = find_columns([row for _, row in islice(rows_of(source, config, "train"), LOOKED_AT)], source)
    named: dict[str, Any] = {"prompt_column": columns.prompt, "answer_column": columns.answer or config.answer_column}
    if columns.solution:
        named["solution_column"] = columns.solution
    return columns, replace(config, **named)


def recipe_text(title: Sequence[str], choices: Sequence[Choice]) -> str:
    """The recipe as TOML, each choice below its reason."""
    lines = [f"# {line}" for line in title]
    for section in dict.fromkeys(c.section for c in choices):
        lines += ["", f"[{section}]"]
        for choice in (c for c in choices if c.section == section):
            lines += textwrap.wrap(choice.why, 110, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"{choice.key} = {toml_value(choice.value)}")
    return "\n".join(lines) + "\n"


def tables_of(choices: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """The choices as the tables of a recipe."""
    tables: dict[str, dict[str, Any]] = {name: {} for name in vars(Config())}
    for choice in choices:
        tables[choice.section][choice.key] = choice.value
    return {name: table for name, table in tables.items() if table}
