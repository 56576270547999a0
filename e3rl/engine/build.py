"""Engines by name, and what one needs to be built for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e3rl.config import RolloutConfig
from e3rl.engine.checks import broken, check_engine_runs
from e3rl.errors import UserError
from e3rl.plugins import load

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
    except TypeError as error:  # it is no class, or takes other arguments
        raise broken(rollout.engine, f"it can't be built: {error}") from error
    if rollout.engine not in ENGINES:
        check_engine_runs(rollout.engine, engine, eos_ids, (1, 2, 3)[:longest_prompt], min(3, rollout.completion_limit))
    return engine
