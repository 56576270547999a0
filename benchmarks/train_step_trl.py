"""TRL's side of `train_step.py`: its own GRPOTrainer in its own loop, timed from callbacks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from train_step_work import LIMIT, SIBLINGS, Work
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


@dataclass
class Steps(TrainerCallback):
    """Seconds of every optimizer step; ``between`` runs after each and is not counted."""

    between: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.between()
        self.began = time.perf_counter()


@dataclass(frozen=True)
class TrlSettings:
    """What is compared, and how often."""

    steps: int
    batch: int  # completions that go through the model together
    kl_coef: float
    learning_rate: float
    recompute: bool = False  # gradient checkpointing


def make_trainer(directory: Path, work: Work, settings: TrlSettings, steps: Steps, output: str) -> GRPOTrainer:
    """A trainer on the fixed completions, where the work has any; else it generates."""
    fixed = bool(work.completions)

    def rollout(asked: list[str], trainer: Any) -> dict[str, Any]:
        places = [(work.texts.index(text), number % SIBLINGS) for number, text in enumerate(asked)]
        completions = [work.completions[p][s] for p, s in places]
        zeros = [[0.0] * len(c) for c in completions]
        return {"prompt_ids": [work.prompts[p] for p, _ in places], "completion_ids": completions, "logprobs": zeros}

    def reward(prompts: list[str], **_: Any) -> list[float | None]:
        return [work.rewards[work.texts.index(text)][number % SIBLINGS] for number, text in enumerate(prompts)]

    count = len(work.texts) * SIBLINGS
    arguments = GRPOConfig(
        output_dir=output, use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=settings.steps,
        num_generations=SIBLINGS, per_device_train_batch_size=settings.batch, max_completion_length=LIMIT,
        gradient_accumulation_steps=count // settings.batch, learning_rate=settings.learning_rate, beta=settings.kl_coef,
        lr_scheduler_type="constant", disable_tqdm=True, loss_type="grpo", logging_steps=1, seed=1,
        gradient_checkpointing=settings.recompute, use_bias_correction_kl=False, shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    return GRPOTrainer(
        model=str(directory),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in work.texts] * settings.steps),
        processing_class=AutoTokenizer.from_pretrained(directory, padding_side="left"),
        rollout_func=rollout if fixed else None,
        callbacks=[steps],
    )


def run_trl(
    directory: Path,
    work: Work,
    settings: TrlSettings,
    between: Callable[[], None],
    ready: Callable[[GRPOTrainer], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Train; ``ready`` is called when everything is loaded. Seconds of each step and the norms of its gradient."""
    steps = Steps(between)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(directory, work, settings, steps, output)
        ready(trainer)
        trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"seconds": steps.seconds, "grad_norms": norms}
