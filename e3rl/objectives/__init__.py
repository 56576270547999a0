"""What is optimised: a table of objectives by name, and how one is made from a config. Imports no torch by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e3rl.config import ObjectiveConfig, build_section
from e3rl.plugins import load

if TYPE_CHECKING:
    from e3rl.objectives.base import Objective

OBJECTIVES = {
    "e3rl": "e3rl.objectives.e3rl:E3RL",
    "grpo": "e3rl.objectives.grpo:GRPO",
}


def build(config: ObjectiveConfig) -> Objective:
    """The objective that the config names, with its options checked."""
    kind = load("objective", config.name, OBJECTIVES)
    objective: Objective = build_section(kind, config.options, "objective")
    return objective
