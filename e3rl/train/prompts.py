"""A run's data: training and held-out prompts as token ids, and solutions where it trains on those."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from e3rl.config import Config
from e3rl.data.loading import held_out_sources, load_problems, spread, training_problems
from e3rl.data.prompts import fitting, prompt_limit
from e3rl.data.rows import lookup
from e3rl.environments.episodes import tool_prompts
from e3rl.errors import UserError
from e3rl.models import Outline, Policy
from e3rl.types import Candidate, Group, Problem, Prompt, Reward, RewardedGroup, Segment, Trajectory

NOT_MEASURED = math.nan
"""No engine drew these tokens, so there is no log-probability, entropy or kept mass to report."""
UNRANKED = 0
"""Nor a rank; those of drawn tokens start at 1."""


@dataclass(frozen=True)
class RunData:
    """The data of a run. ``demonstrations``: by problem id; where there are any they take the place of rollouts."""

    sources: Mapping[str, Sequence[Prompt]]  # what is trained on
    held_out: Mapping[str, Sequence[Prompt]]  # by source
    demonstrations: Mapping[str, RewardedGroup]
    left_out: int = 0  # training prompts that were too long

    @functools.cached_property
    def train(self) -> list[Prompt]:
        """All training prompts."""
        return [prompt for prompts in self.sources.values() for prompt in prompts]

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(p.ids) for prompts in (self.train, *self.held_out.values()) for p in prompts)


def load_data(config: Config, policy: Policy | Outline, *, shown: bool) -> RunData:
    """Prompts of both kinds; ``shown``: the objective learns from the data's solutions."""
    sources, held_out, left_out = load_prompts(config, policy)
    data = RunData(sources, held_out, {}, left_out)
    return replace(data, demonstrations=demonstrations(data.train, policy, config)) if shown else data


def load_prompts(
    config: Config, policy: Policy | Outline
) -> tuple[dict[str, list[Prompt]], dict[str, list[Prompt]], int]:
    """Training and held-out prompts by source, as token ids; and how many training prompts were left out as too long."""

    def rendered(problems: Sequence[Problem]) -> list[Prompt]:
        limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
        return tool_prompts(problems, policy.tokenizer, config, ends=policy.eos_ids, **limits)

    def fit(problems: Sequence[Problem]) -> list[Prompt]:
        unlimited = replace(config, data=replace(config.data, max_prompt_length=0))
        most = {"context_limit": 2**31, "completion_limit": 1}
        every = tool_prompts(problems, policy.tokenizer, unlimited, ends=policy.eos_ids, **most)
        return fitting(every, prompt_limit(config.data, policy.context_length, config.rollout.completion_limit))

    problems = training_problems(config.data)
    render = fit if config.data.filter_overlong_prompts else rendered
    sources = {source: render(found) for source, found in problems.items()}
    held_out = {
        source: rendered(spread(load_problems(source, config=config.data, split="eval"), config.eval.limit))
        for source in held_out_sources(config.data)
    }
    return sources, held_out, sum(map(len, problems.values())) - sum(map(len, sources.values()))


def number_of_steps(config: Config, problems: int) -> int:
    """Optimisation steps over so many training problems: as many as are set, else what the epochs give."""
    per_epoch = problems // config.train.prompts_per_step
    if not per_epoch:
        raise UserError(
            f"train.prompts_per_step = {config.train.prompts_per_step}, but {config.data.trained_on} has only {problems} "
            "problems: lower it"
        )
    return config.train.steps or math.ceil(config.train.epochs * per_epoch)


def demonstrations(prompts: Sequence[Prompt], policy: Policy | Outline, config: Config) -> dict[str, RewardedGroup]:
    """Every problem's demonstration by its id, tokenised once; UserError where one can't be used."""
    _check_settings(config)
    return {prompt.problem.id: demonstration(prompt, policy, config) for prompt in prompts}


def _check_settings(config: Config) -> None:
    """Refuse rollout settings where no rollouts are made."""
    for name, value in (
        ("filter.name", config.filter.name),
        ("train.importance_correction", config.train.importance_correction),
    ):
        if value != "none":
            raise UserError(
                f"{name} = '{value}' is about rollouts, and objective '{config.objective.name}' trains on the data's "
                f"solutions: set it to 'none'"
            )
    if config.train.max_tokens:
        raise UserError(
            f"train.max_tokens counts generated tokens, and objective '{config.objective.name}' generates none, so it "
            "would never end the run: set it to 0, and train.steps or train.epochs to what you want"
        )


def solution(problem: Problem, config: Config) -> str:
    """The problem's worked answer."""
    column = config.data.solution_column
    value = problem.answer if column == config.data.answer_column else lookup(problem.columns, column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"problem '{problem.id}' has no solution to learn from: objective '{config.objective.name}' needs a text in "
            f"column '{column}' (data.solution_column); its columns: {', '.join(problem.columns) or 'none'}"
        )
    return value


def token_trajectory(prompt: Prompt, ids: Sequence[int], measured: float = NOT_MEASURED) -> Trajectory:
    """A response of given tokens that no engine drew: one segment, nothing judged, ``measured`` in place of numbers."""
    blank = (measured,) * len(ids)
    segment = Segment(0, Candidate(ids, blank, blank, blank, blank, (UNRANKED,) * len(ids), ended=True), judgement=None)
    return Trajectory(prompt, 0, (segment,), (), "stop")


def answers_as_responses(prompts: Sequence[Prompt], policy: Policy | Outline) -> tuple[list[Trajectory], list[str]]:
    """Responses that are nothing but the problem's answer ('0' where it has none), to try reward functions on."""
    texts = [prompt.problem.answer or "0" for prompt in prompts]
    ids = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [token_trajectory(prompt, i, measured=0.0) for prompt, i in zip(prompts, ids, strict=True)], texts


def demonstration(prompt: Prompt, policy: Policy | Outline, config: Config) -> RewardedGroup:
    """A group of one: the solution's tokens and the end of sequence. It was made by no policy and has no reward."""
    text, end = solution(prompt.problem, config), policy.tokenizer.eos_token_id
    ids = [
        *policy.tokenizer.encode(text, add_special_tokens=False),
        policy.eos_ids[0] if end is None else end,
    ]
    if len(prompt.ids) + len(ids) > policy.context_length:
        raise UserError(
            f"problem '{prompt.problem.id}': prompt and solution have {len(prompt.ids) + len(ids)} tokens, and the "
            f"model's context holds {policy.context_length}; drop it or shorten it"
        )
    return RewardedGroup(Group(prompt, (token_trajectory(prompt, ids),), policy_version=None), (Reward(None, {}),))
