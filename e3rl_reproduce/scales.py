"""How large a reproduction is: smoke (a test), lab (the embedded model), smollm2 (a small real model), paper (its recipes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import e3rl

RECIPES = Path(e3rl.__file__).parent / "recipes"


@dataclass(frozen=True)
class Scale:
    """What a study's rows are laid on, and how they are examined.

    ``models``: the name that the paper gives a model, to the recipe that trains it. ``segments``: the N×L of table 5.
    ``learning_rates``: the sweep that every method goes through; empty: the recipe's own.
    ``tuning_overrides`` make the sweep cheaper than the training it decides on.
    ``token_budget``: generated tokens at which methods are compared beside the comparison after equal steps; 0: only that.
    ``together``: cells that one process runs.
    """

    name: str
    models: Mapping[str, str]
    benchmarks: Mapping[str, str]
    problems: int
    samples: int
    pass_samples: int
    pass_ks: tuple[int, ...]
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    segments: tuple[tuple[int, int], ...]
    token_budget: int = 0
    overrides: tuple[str, ...] = ()
    validation: Mapping[str, str] = field(default_factory=dict)
    tuning_seed: int = 1000
    tuning_overrides: tuple[str, ...] = ()
    together: int = 1

    def recipe(self, model: str) -> Path:
        return RECIPES / f"{self.models[model]}.toml"


_LAB_BENCHMARKS = {f"chain {n}": f"lab:chain:{n}" for n in (1, 2, 3, 4)} | {
    f"path {n}": f"lab:path:{n}" for n in (1, 2, 3)
}
_LAB_TRAINED = {
    f"{family} {n}": f"lab:{family}:{n}" for family, n in (("chain", 3), ("chain", 4), ("path", 2), ("path", 3))
}

SMOKE = Scale(
    name="smoke",
    models={"lab model": "lab"},
    benchmarks={"chain 1": "lab:chain:1", "path 1": "lab:path:1"},
    problems=4,
    samples=4,
    pass_samples=8,
    pass_ks=(1, 2, 4, 8),
    seeds=(0, 1),
    learning_rates=(),
    segments=((16, 4), (8, 8), (4, 16)),
    token_budget=400,
    overrides=(
        "data.train=lab:chain:1",
        "data.train_limit=8",
        "rollout.num_generations=4",
        "train.steps=2",
        "train.prompts_per_step=2",
        "filter.max_refills=2",
        "eval.limit=2",
        "eval.num_samples=2",
    ),
    validation={"chain 1": "lab:chain:1"},
    together=1000,
)

LAB = Scale(
    name="lab",
    models={"lab model": "lab"},
    benchmarks=_LAB_BENCHMARKS,
    problems=24,
    samples=8,
    pass_samples=64,
    pass_ks=(1, 2, 4, 8, 16, 32, 64),
    seeds=(0, 1, 2),
    learning_rates=(1.875e-5, 3.75e-5, 7.5e-5, 1.5e-4),
    tuning_overrides=("train.steps=12",),
    segments=((32, 2), (16, 4), (8, 8), (4, 16), (2, 32)),
    token_budget=40_000,
    overrides=("eval.limit=8", "eval.num_samples=2"),  # the run's own evaluation: exams take its place
    validation=_LAB_TRAINED,
    together=2,
)

SMOLLM2 = Scale(
    name="smollm2",
    models={"SmolLM2-135M": "smollm2-arithmetic"},
    benchmarks={f"arith {n}": f"lab:arith:{n}" for n in (1, 2, 3)},
    problems=24,
    samples=8,
    pass_samples=32,
    pass_ks=(1, 2, 4, 8, 16, 32),
    seeds=(0,),
    learning_rates=(),
    segments=((8, 4), (4, 8), (2, 16)),
    overrides=("eval.limit=6", "eval.num_samples=2"),
)

PAPER = Scale(
    name="paper",
    models={
        "Qwen3-4B": "qwen3-4b",
        "Qwen3-8B": "qwen3-8b",
        "Qwen2.5-1.5B": "erpo-qwen2.5-1.5b",
        "Qwen2.5-3B": "erpo-qwen2.5-3b",
        "Qwen2.5-7B": "erpo-qwen2.5-7b",
    },
    benchmarks={
        "AMC 2023": "amc23",
        "AIME 2024": "aime24",
        "AIME 2025": "aime25",
        "AIME 2026": "aime26",
        "MATH 500": "math500",
        "Minerva": "minerva",
        "OlympiadBench": "olympiadbench",
    },
    problems=0,
    samples=32,
    pass_samples=256,
    pass_ks=(1, 8, 16, 32, 64, 128, 256),
    seeds=(0,),
    learning_rates=(),
    segments=((32, 256), (16, 512), (8, 1024), (4, 2048), (2, 4096)),
)

ERPO_PAPER = replace(
    PAPER,
    benchmarks={name: PAPER.benchmarks[name] for name in ("AMC 2023", "Minerva", "AIME 2024", "AIME 2025")},
    samples=16,
    pass_samples=16,
    pass_ks=(2, 4, 8, 16),
)
"""What the ERPO paper reports on."""

SCALES = {scale.name: scale for scale in (SMOKE, LAB, SMOLLM2, PAPER)}
