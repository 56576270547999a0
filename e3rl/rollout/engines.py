"""Engines by name, and what one needs to be built for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e3rl.config import RolloutConfig
from e3rl.plugins import load

if TYPE_CHECKING:
    from torch import nn

    from e3rl.rollout.engine import Engine

ENGINES = {
    "torch": "e3rl.rollout.torch_engine:TorchEngine",
    "recompute": "e3rl.rollout.recompute_engine:RecomputeEngine",
}


def build_engine(rollout: RolloutConfig, model: nn.Module, eos_ids: tuple[int, ...], longest_prompt: int) -> Engine:
    """The engine that the config names, with room for the longest prompt and a full response in every row."""
    kind: Any = load("engine", rollout.engine, ENGINES)
    engine: Engine = kind(
        model,
        eos_ids=eos_ids,
        max_rows=rollout.max_rows,
        cache_rows=rollout.cache_rows or 2 * rollout.max_rows,
        max_length=longest_prompt + rollout.completion_limit,
    )
    return engine
