"""The prompts of a run: what it trains on, in how many steps, and what it is evaluated on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from e3rl.config import Config
from e3rl.data.loading import held_out_sources, load_problems
from e3rl.data.prompts import render_prompts
from e3rl.errors import UserError
from e3rl.evaluate.evaluation import spread
from e3rl.models import Policy
from e3rl.types import Problem, Prompt


def load_prompts(config: Config, policy: Policy) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """Training prompts, and held-out ones by source, as token ids."""

    def rendered(problems: Sequence[Problem]) -> list[Prompt]:
        limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
        return render_prompts(problems, policy.tokenizer, config.data, **limits)

    train = rendered(load_problems(config.data.train, config=config.data, split="train"))
    held_out = {
        source: rendered(spread(load_problems(source, config=config.data, split="eval"), config.eval.limit))
        for source in held_out_sources(config.data)
    }
    return train, held_out


def number_of_steps(config: Config, problems: int) -> int:
    """Optimisation steps over so many training problems: as many as are set, else what the epochs give."""
    per_epoch = problems // config.train.prompts_per_step
    if not per_epoch:
        raise UserError(
            f"train.prompts_per_step = {config.train.prompts_per_step}, but {config.data.train} has only {problems} problems: "
            "lower it"
        )
    return config.train.steps or math.ceil(config.train.epochs * per_epoch)
