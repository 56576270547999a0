"""What a trainer and a rollout worker say to each other. A group is the unit of work; its draws name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from e3rl import __version__
from e3rl.rollout.group import GroupSettings
from e3rl.types import Candidate, Draw, Erasure, Group, Prompt, Segment, Trajectory

PROTOCOL = 1


@dataclass(frozen=True)
class Hello:
    """What a worker is. ``rows``: sequences it holds at once; ``policy_version`` is None before any weights came."""

    protocol: int
    e3rl: str
    architecture: str
    rows: int
    max_length: int
    policy_version: int | None


@dataclass(frozen=True)
class Task:
    """A group to generate. The prompt's other fields stay with the trainer."""

    prompt_id: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """Take these groups, and tell me within ``wait`` seconds what is finished. A new ``run`` drops what was before."""

    run: str
    settings: GroupSettings
    tasks: tuple[Task, ...]
    wait: float


@dataclass(frozen=True)
class Response:
    """A trajectory without its prompt."""

    sibling: int
    segments: tuple[Segment, ...]
    erasures: tuple[Erasure, ...]
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Finished:
    """A group that is done, and the policy version that made it."""

    prompt_id: str
    policy_version: int
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Fault:
    """Why a worker can't go on, where another attempt would end in the same way."""

    kind: str
    message: str
    draw: Draw | None = None


@dataclass(frozen=True)
class Answer:
    """``beat`` counts candidates since the worker started: one that stands still has hung."""

    run: str
    finished: tuple[Finished, ...]
    beat: int
    fault: Fault | None = None


def finished_of(group: Group) -> Finished:
    """A group on its way to the trainer."""
    assert group.policy_version is not None
    responses = tuple(Response(t.sibling, t.segments, t.erasures, t.finish) for t in group.trajectories)
    return Finished(group.prompt.problem.id, group.policy_version, responses)


def group_of(finished: Finished, prompt: Prompt, settings: GroupSettings, vocabulary: int) -> Group:
    """The group with its prompt. ValueError where it can't be an answer to what was asked."""
    rollout, version = settings.rollout, settings.policy_version
    if finished.policy_version != version:
        raise ValueError(f"rollouts of policy version {finished.policy_version}; version {version} was asked for")
    if [r.sibling for r in finished.responses] != list(range(rollout.num_generations)):
        raise ValueError(f"{len(finished.responses)} responses of {rollout.num_generations} that were asked for")
    for response in finished.responses:
        candidates = [s.candidate for s in response.segments] + [e.candidate for e in response.erasures]
        for candidate in candidates:
            _check_candidate(candidate, rollout.segment_length, vocabulary)
        tokens = sum(len(s.candidate.ids) for s in response.segments)
        if not 0 < tokens <= rollout.completion_limit:
            raise ValueError(f"a response of {tokens} tokens; between 1 and {rollout.completion_limit} were asked for")
    trajectories = (Trajectory(prompt, r.sibling, r.segments, r.erasures, r.finish) for r in finished.responses)
    return Group(prompt, tuple(trajectories), version)


def _check_candidate(candidate: Candidate, longest: int, vocabulary: int) -> None:
    size = len(candidate.ids)
    columns = (candidate.logprobs, candidate.entropies, candidate.perturbations, candidate.kept_mass, candidate.ranks)
    if not 0 < size <= longest or any(len(column) != size for column in columns):
        raise ValueError(f"a candidate of {size} tokens with {[len(c) for c in columns]} measures")
    if not all(0 <= i < vocabulary for i in candidate.ids):
        raise ValueError(f"token ids outside the vocabulary of {vocabulary}")
    if not all(0 <= h < float("inf") for h in candidate.entropies):  # NaN too
        raise ValueError("entropies that are no entropies")


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
