"""What the rows of `e3rl reproduce settle` and `confirm` are laid on: scales, and the embedded model made worse by noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from e3rl.config import load_config
from e3rl.errors import UserError
from e3rl.files import atomic_directory
from e3rl.models import load_policy
from e3rl.weights.files import save_pretrained
from e3rl_reproduce.study import LAB, SMOKE, Scale

SCALES = {
    "smoke": replace(
        SMOKE,
        seeds=(0,),
        overrides=(*SMOKE.overrides, "train.eval_steps=1", "train.minibatches=1", "train.learning_rate=1e-4"),
        token_budget=0,
        validation={},
    ),
    "lab": replace(
        LAB,
        seeds=tuple(range(8)),
        learning_rates=(),
        token_budget=0,
        validation={},
        together=8,
        overrides=(
            "data.train=lab:chain:4",
            "data.eval=lab:chain:4",
            "rollout.segment_length=8",
            "rollout.max_segments=8",
            "train.steps=16",
            "train.prompts_per_step=8",
            "train.minibatches=1",
            "train.learning_rate=1e-4",
            "train.eval_steps=8",
            "eval.limit=64",
            "eval.num_samples=4",
        ),
    ),
}

CONFIRMED = {
    "smoke": replace(SCALES["smoke"], name="confirm-smoke"),
    "lab": replace(SCALES["lab"], name="confirm", seeds=tuple(range(8, 24))),
}
"""Seeds that nothing was chosen with: 8 to 15, and 16 to 23 for what was thought of after those."""

NOISE, MORE_NOISE, CHAIN_3_NOISE = 0.09, 0.12, 0.095
"""Standard deviations of each weight matrix: chain 4 begins at 0.1 and at 0.05, chain 3 at 0.3."""


def weakened_name(noise: float) -> str:
    """The directory of the model with so much noise."""
    return f"weakened-{noise:g}"


def weakened(scale: Scale, out: Path) -> tuple[str, ...]:
    """The embedded model with noise on its weight matrices, the same each time, under ``out``; settings that name the first."""
    if scale.name not in {known.name for known in (*SCALES.values(), *CONFIRMED.values())}:
        raise UserError(
            f"settle, confirm: they train on lab problems alone, so their scales are {' and '.join(SCALES)}"
        )
    for noise in (NOISE, MORE_NOISE, CHAIN_3_NOISE):
        path = out / weakened_name(noise)
        if path.is_dir():
            continue
        policy = load_policy(load_config(overrides=["model.path=lab"]).model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in policy.model.parameters():
                if weight.ndim == 2:
                    weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        with atomic_directory(path) as temporary:
            save_pretrained(policy, temporary, "The embedded model with noise on its weights.\n")
    return (f"model.path={out / weakened_name(NOISE)}", "model.device=cpu")
