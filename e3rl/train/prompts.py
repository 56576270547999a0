"""The prompts of a run: what it trains on, in how many steps, and what it is evaluated on."""

from __future__ import annotations

import math

from e3rl.config import Config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.errors import UserError
from e3rl.evaluate.evaluation import spread
from e3rl.models import Policy
from e3rl.types import Prompt


def load_prompts(config: Config, policy: Policy) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, as token ids."""
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    train = load_problems(config.data.train, config=config.data, split="train")
    held_out = config.data.eval or (config.data.train if config.data.train.startswith("lab:") else "")
    evaluation = load_problems(held_out, config=config.data, split="eval") if held_out else []
    evaluation = spread(evaluation, config.eval.limit)
    return (
        render_prompts(train, policy.tokenizer, config.data, **limits),
        render_prompts(evaluation, policy.tokenizer, config.data, **limits),
    )


def number_of_steps(config: Config, problems: int) -> int:
    """Optimisation steps over so many training problems: as many as are set, else what the epochs give."""
    per_epoch = problems // config.train.prompts_per_step
    if not per_epoch:
        raise UserError(
            f"train.prompts_per_step = {config.train.prompts_per_step}, but {config.data.train} has only {problems} problems: "
            "lower it"
        )
    return config.train.steps or math.ceil(config.train.epochs * per_epoch)
