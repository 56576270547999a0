"""Erasable rollouts inside TRL's own GRPOTrainer, through its ``rollout_func``. Imports nothing of TRL.

    trainer = GRPOTrainer(model, reward_funcs=..., args=..., train_dataset=..., rollout_func=erasable_rollout())

Trainer, loss, reward functions and data stay TRL's; only how completions are generated changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from e3rl.config import Config, RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.errors import UserError
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.orders import Event
from e3rl.types import Problem, Prompt, Trajectory

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]


def erasable_rollout(config: Config | None = None, *, observe: Callable[[Event], None] | None = None) -> RolloutFunc:
    """A ``rollout_func`` for TRL's GRPOTrainer that judges segments and redraws uncertain ones.

    ``config`` gives the segments (``rollout.segment_length``), the engine and its rows, and the whole of ``[erasure]``;
    without one, the longest completion is divided into eight segments. The rest follows the trainer's arguments:
    number of generations, temperature, top-p, top-k, longest completion, seed.

    Reward functions may name the extra columns ``erasures`` (erased candidates), ``erased_tokens``, ``segment_lengths``
    and ``erased_ids``, a value for each completion.
    """
    return _Rollout(config, observe)


class _Rollout:
    """Keeps the engine between calls; it runs on the trainer's current weights."""

    def __init__(self, config: Config | None, observe: Callable[[Event], None] | None) -> None:
        self._config, self._observe = config, observe
        self._engine: Engine | None = None
        self._built_for: tuple[int, int] = (0, 0)
        self._calls = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's contract: one completion for each prompt given, siblings being equal prompts in a row."""
        model = _model_of(trainer)
        siblings = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        rollout = self._settings(trainer.args, siblings)
        self._calls += 1
        rendered = [
            Prompt(Problem(f"call-{self._calls}/rank-{trainer.accelerator.process_index}/prompt-{i}", ""), tuple(ids))
            for i, ids in enumerate(_prompt_ids(_groups(prompts, siblings), trainer))
        ]
        engine = self._engine_for(model, trainer, rollout, max(len(p.ids) for p in rendered))
        step = trainer.state.global_step
        erasure = (self._config or Config()).erasure
        settings = GroupSettings(rollout, erasure, trainer.args.seed, step=step, policy_version=step)
        groups = {g.prompt.problem.id: g for g in run_groups(engine, rendered, settings, observe=self._observe)}
        return _columns([t for p in rendered for t in groups[p.problem.id].trajectories])

    def _settings(self, arguments: Any, siblings: int) -> RolloutConfig:
        limit = arguments.max_completion_length
        given = self._config.rollout if self._config else RolloutConfig(segment_length=math.ceil(limit / 8))
        return replace(
            given,
            num_generations=siblings,
            max_segments=math.ceil(limit / given.segment_length),
            max_completion_length=limit,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k or 0,
        )

    def _engine_for(self, model: Any, trainer: Any, rollout: RolloutConfig, longest: int) -> Engine:
        """The engine of the last call, or a new one where a prompt is longer than any before."""
        built_for = (id(model), longest)
        if self._engine is None or self._built_for[0] != built_for[0] or self._built_for[1] < longest:
            self._engine = build_engine(rollout, model, tuple(trainer.eos_token_ids), longest)
            self._built_for = built_for
        else:
            self._engine.load_weights({}, trainer.state.global_step)
        return self._engine


def _model_of(trainer: Any) -> Any:
    """The unwrapped model. Refuses sharded weights and trainers that generate with vLLM."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if getattr(trainer, "is_fsdp_enabled", False) or (plugin is not None and plugin.zero_stage == 3):
        raise UserError(
            "erasable_rollout decodes on the trainer's own weights, and FSDP or ZeRO-3 leave each process only a part "
            "of them: train with one process, DDP or ZeRO-2"
        )
    if trainer.use_vllm:
        raise UserError("erasable_rollout generates by itself: set use_vllm=False")
    return trainer.accelerator.unwrap_model(trainer.model)


def _groups(prompts: Sequence[Any], siblings: int) -> list[Any]:
    """One prompt of every group; TRL repeats a prompt for each of its completions."""
    firsts = list(prompts[::siblings])
    repeated = [p for p in firsts for _ in range(siblings)]
    if repeated != list(prompts):
        raise UserError(
            f"this process got {len(prompts)} prompts that are no whole groups of {siblings}: thresholds compare the "
            "siblings of a group, so make per_device_train_batch_size * steps_per_generation a multiple of "
            "num_generations (for evaluation, per_device_eval_batch_size)"
        )
    return firsts


def _prompt_ids(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """As in TRL: conversations go through the chat template, strings don't."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        return [list(ids) for ids in tokenizer(text=list(prompts))["input_ids"]]
    return [
        list(
            tokenizer.apply_chat_template(
                prompt,
                chat_template=trainer.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **trainer.chat_template_kwargs,
            )
        )
        for prompt in prompts
    ]


def _columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """The columns that TRL needs, and extra ones for its reward functions."""
    return {
        "prompt_ids": [list(t.prompt.ids) for t in trajectories],
        "completion_ids": [t.ids.tolist() for t in trajectories],
        "logprobs": [t.logprobs.tolist() for t in trajectories],
        "erasures": [len(t.erasures) for t in trajectories],
        "erased_tokens": [t.erased_tokens for t in trajectories],
        "erased_ids": [[e.candidate.ids.tolist() for e in t.erasures] for t in trajectories],
        "segment_lengths": [list(t.segment_lengths) for t in trajectories],
    }
