"""Messages between a trainer and a rollout worker. The unit of work is a group, named by its draws.

Messages are JSON (`e3rl.cluster.wire`); groups travel as record batches (`e3rl.rollout.columns`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from e3rl import __version__
from e3rl.cluster.wire import decode, encode, from_plain, to_plain
from e3rl.config import RolloutConfig
from e3rl.environments.protocol import Tools
from e3rl.errors import UserError
from e3rl.rollout.columns import decode as decode_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.ipc import from_ipc, problem_of, to_ipc
from e3rl.types import MEASURES, Draw, Group, Message, Problem, Prompt, Trajectory

PROTOCOL = 5


@dataclass(frozen=True)
class Hello:
    """What a worker is. ``rows``: sequences it holds at once; ``policy_version`` is None before any weights came. ``node``: see
    `e3rl.weights.publish.this_node`."""

    protocol: int
    e3rl: str
    architecture: str
    rows: int
    max_length: int
    policy_version: int | None
    node: str


@dataclass(frozen=True)
class Task:
    """A group to generate. ``row``: the problem as JSON, if its environment is at the worker; else it stays with the trainer."""

    prompt_id: str
    ids: tuple[int, ...]
    row: str | None = None

    @classmethod
    def of(cls, prompt: Prompt) -> Task:
        """The task of a prompt; UserError where its row can't be sent."""
        problem = prompt.problem
        if prompt.tools is None:
            return cls(problem.id, prompt.ids)
        row = {"prompt": to_plain(problem.prompt), "answer": problem.answer, "columns": dict(problem.columns)}
        try:
            return cls(problem.id, prompt.ids, json.dumps(row))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"problem '{problem.id}' can't be sent to a rollout worker, where its environment is: {error}. Keep texts, "
                "numbers, lists and tables in its columns, or set rollout.workers = 0"
            ) from None

    def prompt(self, tools: Tools | None) -> Prompt:
        """The prompt as a worker needs it; ValueError where the row is none."""
        if self.row is None:
            return Prompt(Problem(self.prompt_id, ""), self.ids)
        row = json.loads(self.row)
        if not isinstance(row, dict) or row.keys() != {"prompt", "answer", "columns"}:
            raise ValueError(f"the row of '{self.prompt_id}' is no problem")
        said = row["prompt"]
        text = said if isinstance(said, str) else tuple(from_plain(Message, each, "prompt") for each in said)
        return Prompt(Problem(self.prompt_id, text, row["answer"], row["columns"]), self.ids, tools)


@dataclass(frozen=True)
class Ask:
    """Asks for these groups, and for what is finished within ``wait`` seconds. A new ``run`` drops earlier groups.

    ``tools``: the `Tools.identity` that they need; empty for none.
    """

    run: str
    settings: GroupSettings
    tasks: tuple[Task, ...]
    wait: float
    tools: str = ""


@dataclass(frozen=True)
class Fault:
    """An error that another attempt would meet again."""

    kind: str
    message: str
    draw: Draw | None = None


@dataclass(frozen=True)
class Answer:
    """What goes before the groups that are done. ``beat`` counts candidates and tools' calls since the worker started: one
    that does not change means that the worker hangs."""

    run: str
    beat: int
    fault: Fault | None = None


def encode_answer(answer: Answer, groups: Sequence[pa.RecordBatch]) -> bytes:
    """An answer as JSON in a line, then its groups, if there are any, as an Arrow IPC stream."""
    return encode(answer) + b"\n" + (to_ipc(groups) if groups else b"")


def decode_answer(body: bytes) -> tuple[Answer, list[pa.RecordBatch]]:
    """What `encode_answer` was given; ValueError where it is anything else."""
    head, _, groups = body.partition(b"\n")
    return decode(Answer, head), from_ipc(groups) if groups else []


def group_of(batch: pa.RecordBatch, prompt: Prompt, settings: GroupSettings, vocabulary: int) -> Group:
    """The group that a batch of `from_ipc` holds. ValueError where it can't be an answer to what was asked."""
    rollout, version = settings.rollout, settings.policy_version
    siblings, versions = batch["sibling"].to_pylist(), set(batch["policy_version"].to_pylist())
    if problem_of(batch) != prompt.problem.id:
        raise ValueError(f"a group of problem '{problem_of(batch)}'; '{prompt.problem.id}' was asked for")
    if versions != {version}:
        raise ValueError(f"rollouts of policy version {versions}; version {version} was asked for")
    if siblings != list(range(rollout.num_generations)):
        raise ValueError(f"{len(siblings)} responses of {rollout.num_generations} that were asked for")
    if any(ids != list(prompt.ids) for ids in batch["prompt_ids"].to_pylist()):
        raise ValueError("responses to other tokens than those of the prompt")
    for name in ("segments", "erasures"):
        _check_candidates(batch[name].values, rollout, vocabulary, tools=prompt.tools is not None)
    [item] = decode_groups(batch, lambda *_: prompt)
    for trajectory in item.group.trajectories:
        tokens = trajectory.committed_tokens
        if not 0 < tokens <= len(trajectory.ids) <= rollout.completion_limit:
            raise ValueError(
                f"a response of {len(trajectory.ids)} tokens; between 1 and {rollout.completion_limit} were asked for"
            )
        if [s.index for s in trajectory.segments] != list(range(len(trajectory.segments))):
            raise ValueError("segments that are not in order")
        _check_erasures(trajectory, settings)
    return item.group


def _check_erasures(trajectory: Trajectory, settings: GroupSettings) -> None:
    """ValueError where erasures can't stand where they say: a trainer may learn from each, behind what it was drawn after."""
    limit, most = settings.rollout.completion_limit, settings.erasure.max_erasures * settings.rollout.erase
    for place, erasure in enumerate(trajectory.erasures):
        start, size = erasure.start, len(erasure.candidate.ids)
        if not 0 <= start <= limit - size or not 0 <= erasure.index < limit:
            raise ValueError(
                f"an erasure of {size} tokens behind {start}, in segment {erasure.index}, of {limit} tokens"
            )
        if len(trajectory.context_of(place)) != start:
            raise ValueError(f"an erasure behind {start} tokens, which are not there")
    erased = Counter(e.index for e in trajectory.erasures)
    if trajectory.prompt.tools is None and max(erased.values(), default=0) > most:
        raise ValueError(f"{max(erased.values())} erasures of a segment; {most} were asked for at most")


def _check_candidates(struct: pa.StructArray, rollout: RolloutConfig, vocabulary: int, *, tools: bool) -> None:
    """Sizes, tokens and measures of all candidates at once. What has an observation may be longer than a segment."""
    ids, entropies = (struct.field(name).values.to_numpy() for name in ("ids", "entropies"))
    sizes, drawn = (
        np.diff(struct.field("ids").offsets.to_numpy()),
        struct.field("observation").is_null().to_numpy(False),
    )
    if not tools and not drawn.all():
        raise ValueError("observations of an environment where none was asked for")
    longest = np.where(drawn, rollout.segment_length, rollout.completion_limit)
    for place in np.flatnonzero((sizes < 1) | (sizes > longest)).tolist():
        raise ValueError(f"a candidate of {sizes[place]} tokens; between 1 and {longest[place]} were asked for")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocabulary:
        raise ValueError(f"token ids outside the vocabulary of {vocabulary}")
    if not ((entropies >= 0) & (entropies < np.inf)).all():  # NaN too
        raise ValueError("entropies that are no entropies")
    u, threshold = (struct.field(name).drop_null().to_numpy() for name in ("uncertainty", "threshold"))
    if not np.isfinite(u).all() or np.isnan(threshold).any():
        raise ValueError("judgements that are no numbers")
    for name in MEASURES:
        if not np.isfinite(struct.field(name).values.to_numpy()).all():
            raise ValueError(f"{name} that are not finite")


def check_hello(hello: Hello, architecture: str, longest: int, siblings: int) -> str | None:
    """Why this worker can't serve the run, in words; None where it can."""
    if hello.protocol != PROTOCOL or hello.e3rl != __version__:
        return f"it runs e3rl {hello.e3rl} (protocol {hello.protocol}), the trainer {__version__} (protocol {PROTOCOL})"
    if hello.architecture != architecture:
        return "it has loaded a model of another architecture than the trainer's: start it with the run's own recipe"
    if hello.max_length < longest:
        return f"its rows hold {hello.max_length} tokens and the run needs {longest}: start it with a longer --longest-prompt"
    if hello.rows < siblings:
        return f"it holds {hello.rows} rows and a group needs {siblings}: raise its rollout.cache_rows"
    return None
