"""Engines by name, built for a run. One from outside is first tried on two short rows, and the broken clause is named.

`e3rl.testing.engine` holds the whole contract; it needs a second engine to compare with and takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from e3rl.config import RolloutConfig
from e3rl.engine.protocol import Sampling
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.types import Candidate, Draw

if TYPE_CHECKING:
    from torch import nn

    from e3rl.engine.protocol import Engine

ENGINES = {
    "torch": "e3rl.engine.torch.engine:TorchEngine",
    "recompute": "e3rl.engine.recompute:RecomputeEngine",
    "vllm": "e3rl.engine.vllm.engine:VllmEngine",
}


def build_engine(rollout: RolloutConfig, model: nn.Module, eos_ids: tuple[int, ...], longest_prompt: int) -> Engine:
    """The engine that the config names, with room for the longest prompt and a full response in every row.

    A class with further settings says which by ``own_settings(rollout)``. One from outside is tried out on two short rows
    first.
    """
    kind: Any = load("engine", rollout.engine, ENGINES)
    own: dict[str, Any] = kind.own_settings(rollout) if hasattr(kind, "own_settings") else {}
    try:
        engine: Engine = kind(
            model,
            eos_ids=eos_ids,
            max_rows=rollout.max_rows,
            cache_rows=rollout.cache_rows or 2 * rollout.max_rows,
            max_length=longest_prompt + rollout.completion_limit,
            **own,
        )
    except UserError:
        raise
    except TypeError as error:  # not a class, or one that takes other arguments
        raise broken(rollout.engine, f"it can't be built: {error}") from error
    if rollout.engine not in ENGINES:
        check_engine_runs(rollout.engine, engine, eos_ids, (1, 2, 3)[:longest_prompt], min(3, rollout.completion_limit))
    return engine


_METHODS = ("free_rows", "prefill", "length", "extend", "poll", "rollback", "release", "load_weights")


def broken(name: str, clause: str) -> UserError:
    """The error that names the engine and the clause of the contract that it breaks."""
    return UserError(f"engine '{name}' breaks its contract: {clause}. See docs/extend.md.")


def check_engine_runs(name: str, engine: Any, eos_ids: Sequence[int], prompt: Sequence[int], tokens: int) -> None:
    """Two siblings: generate, roll back, generate again, release. Raises UserError naming the broken clause."""
    for method in _METHODS:
        if not callable(getattr(engine, method, None)):
            raise broken(name, f"{type(engine).__name__} has no method `{method}`")
    try:
        _try_out(name, engine, eos_ids, prompt, tokens)
    except UserError:
        raise
    except Exception as error:  # an engine from outside may fail in any way
        raise broken(name, f"it failed on a toy prompt with {type(error).__name__}: {error}") from error


def _try_out(name: str, engine: Engine, eos_ids: Sequence[int], prompt: Sequence[int], tokens: int) -> None:
    free = engine.free_rows()
    rows = engine.prefill(prompt, 2)
    if len(set(rows)) != 2 or engine.free_rows() != free - 2:
        raise broken(name, f"`prefill` for 2 siblings gave {rows} and left {engine.free_rows()} of {free} rows free")
    first = _generate(name, engine, rows[0], tokens, 0)
    check_candidate(name, first, tokens, eos_ids)
    if engine.length(rows[0]) != len(first.ids) or engine.length(rows[1]) != 0:
        raise broken(name, "`length` does not count the generated tokens of its own row alone")
    engine.rollback(rows[0], 0)
    if engine.length(rows[0]) != 0:
        raise broken(name, f"after `rollback` to 0 the row still holds {engine.length(rows[0])} tokens")
    if _generate(name, engine, rows[0], tokens, 0).ids.tolist() != first.ids.tolist():
        raise broken(name, "the same draw after a rollback gave other tokens")
    if _generate(name, engine, rows[1], tokens, 0).ids.tolist() != first.ids.tolist():
        raise broken(name, "the same draw on a sibling with the same prompt gave other tokens")
    for row in rows:
        engine.release(row)
    if engine.free_rows() != free:
        raise broken(name, f"all rows were released, and {engine.free_rows()} of {free} are free")


def _generate(name: str, engine: Engine, row: Any, tokens: int, attempt: int) -> Candidate:
    engine.extend(row, tokens, Draw(0, 0, "engine check", 0, 0, attempt), Sampling())
    delivered = engine.poll()
    if [r for r, _ in delivered] != [row]:
        raise broken(name, f"one request was open, of row {row}, and `poll` delivered {[r for r, _ in delivered]}")
    return delivered[0][1]


def check_candidate(name: str, candidate: Any, tokens: int, eos_ids: Sequence[int]) -> None:
    """A `Candidate` that is consistent in itself and with what was asked for."""
    if not isinstance(candidate, Candidate):
        raise broken(name, f"`poll` must deliver a Candidate, and delivered a {type(candidate).__name__}")
    size = len(candidate.ids)
    for field in ("logprobs", "entropies", "perturbations", "kept_mass"):
        if len(getattr(candidate, field)) != size:
            raise broken(name, f"a candidate of {size} tokens carries {len(getattr(candidate, field))} {field}")
    ended = size > 0 and candidate.ids[-1] in eos_ids
    if candidate.ended != ended or not (size == tokens or (ended and size < tokens)):
        raise broken(name, f"{tokens} tokens were asked for and {size} delivered, with ended = {candidate.ended}")
    if min(candidate.entropies) < 0 or min(candidate.perturbations) < 0 or max(candidate.logprobs) > 1e-4:
        raise broken(name, "entropies and perturbations can't be below 0, nor log-probabilities above it")
