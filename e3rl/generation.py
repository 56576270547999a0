"""Erasable decoding of a few prompts, without training: `generate`, which `e3rl decode` uses too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from e3rl.config import Config, RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.environments.episodes import tool_prompts
from e3rl.errors import UserError
from e3rl.models import Policy, load_policy, resolve_model_path
from e3rl.rollout.batches import run_groups
from e3rl.rollout.companions import find_companions
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.types import Message, Problem, Prompt, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 4096
"""Most tokens of prompt and answer together where no length is set, as in `e3rl serve`."""

PromptLike = str | Sequence[Message] | Problem


@dataclass(frozen=True)
class Generation:
    """One sample: its text, and its trajectory with the erased candidates."""

    text: str
    trajectory: Trajectory

    @property
    def erased(self) -> int:
        """Candidates that were erased."""
        return len(self.trajectory.erasures)


def _as_problem(index: int, prompt: PromptLike) -> Problem:
    if isinstance(prompt, Problem):
        return prompt
    return Problem(id=f"prompt-{index}", prompt=prompt if isinstance(prompt, str) else tuple(prompt))


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    calibration: CalibrationStatistics | None,
    observe: Callable[[Any], None] | None = None,
) -> list[list[Trajectory]]:
    """``rollout.num_generations`` trajectories of every prompt, in the prompts' order."""
    longest = max(len(p.ids) for p in prompts)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, longest)
    settings = GroupSettings(config.rollout, config.erasure, config.run.seed, calibration=calibration)
    groups = run_groups(engine, prompts, settings, observe=observe)
    by_id = {g.prompt.problem.id: list(g.trajectories) for g in groups}
    return [by_id[p.problem.id] for p in prompts]


def generate(
    model: str | Policy | PreTrainedModel,
    prompts: PromptLike | Sequence[PromptLike],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    erase: bool = True,
    samples: int = 1,
    config: Config | None = None,
    whole: bool | None = None,
    observe: Callable[[Any], None] | None = None,
) -> list[list[Generation]]:
    """Decode ``samples`` answers to every prompt, erasing and redrawing segments on the way unless ``erase`` is False.

    ``model`` is a directory, a hub id, 'lab', 'smollm2', a loaded `Policy`, or a loaded transformers model with its
    ``tokenizer``. Without ``config`` the settings saved beside the model are used, or the defaults; they run no code. With
    ``whole``, the default without ``config``, answers may be as long as the context and `LONGEST` allow. With
    one sample the thresholds come from calibration statistics saved beside the model (`e3rl calibrate`); several samples of a
    prompt are a group of their own. A `Problem` is a prompt with a row's columns, which an environment may need.
    """
    loaded = None if isinstance(model, str) else _loaded(model, tokenizer)
    companions = find_companions(resolve_model_path(loaded.source if loaded else str(model)))
    whole = config is None if whole is None else whole
    config = config or companions.config()
    policy = loaded or load_policy(replace(config.model, path=str(model)))
    rollout = replace(config.rollout, erase=erase, num_generations=samples)
    config = replace(config, rollout=rollout)
    several = [prompts] if isinstance(prompts, str | Problem) or _is_conversation(prompts) else list(prompts)
    if not several:
        raise UserError("there is no prompt to decode")
    problems = [_as_problem(i, p) for i, p in enumerate(several)]  # type: ignore[arg-type]
    rendered = tool_prompts(
        problems,
        policy.tokenizer,
        config,
        context_limit=policy.context_length,
        completion_limit=1 if whole else rollout.completion_limit,
        ends=policy.eos_ids,
    )
    if whole:
        config = replace(config, rollout=to_the_end(config.rollout, policy.context_length, rendered))
    found = sample(policy, rendered, config, calibration=companions.calibration, observe=observe)
    decode = policy.tokenizer.decode
    return [[Generation(decode(t.ids.tolist(), skip_special_tokens=True), t) for t in group] for group in found]


def to_the_end(rollout: RolloutConfig, context_length: int, prompts: Sequence[Prompt]) -> RolloutConfig:
    """The settings with as many segments as fit behind the longest prompt, and rows only for these prompts' samples."""
    room = max(1, min(context_length, LONGEST) - max(len(p.ids) for p in prompts))
    rows = min(rollout.max_rows, len(prompts) * rollout.num_generations)
    return replace(
        rollout,
        max_segments=math.ceil(room / rollout.segment_length),
        max_completion_length=min(room, rollout.max_completion_length or room),
        max_rows=rows,
        cache_rows=min(rollout.cache_rows or 2 * rows, max(2 * rows, rollout.num_generations)),
    )


def _loaded(model: Any, tokenizer: Any) -> Policy:
    """A policy around a model that is already loaded."""
    if isinstance(model, Policy):
        return model
    if tokenizer is None:
        raise UserError("a loaded model needs its tokenizer: generate(model, prompts, tokenizer=tokenizer)")
    return Policy.of(model, tokenizer)


def _is_conversation(prompts: Any) -> bool:
    return bool(prompts) and all(isinstance(p, Message) for p in prompts)
