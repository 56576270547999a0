"""Several runs, one after the other, by all ranks that torchrun started; the tests compare what they leave behind.

    torchrun --nproc_per_node 2 -m tests.ranks.run MODEL DIRECTORY ddp zero1 …

A name is a value of ``train.parallel`` and a variant: ``zero1_half`` ends in the middle. With a plus it is a run to take up
again: ``zero1_half+`` goes on with the run ``zero1_half`` to the last step.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from e3rl.train.collect import Prefetch
from e3rl.train.learner import Learner
from e3rl.train.trainer import Trainer
from e3rl.types import RewardedGroup
from tests.train.random_lab import lab_config

SETTINGS = (
    "rollout.num_generations=4",
    "rollout.max_segments=3",
    "erasure.kappa0=0.8",
    "objective.kl_coef=0.0",
    "train.prompts_per_step=5",
    "train.learning_rate=3e-4",
    "train.micro_batch_tokens=200",
    "train.save_steps=2",
    "train.rank_timeout=120",
    "data.train_limit=10",
    "eval.limit=3",
    "eval.num_samples=5",
    'rewards.functions=["tests.ranks.run:evenness"]',
)
STEPS = 4
ARRIVING = (
    "rollout.staleness=2",
    "train.importance_correction=segment_truncate",
    "train.learning_rate=1e-9",
    "objective.name=dapo",
)
VARIANTS = {
    "": (),
    "half": (),
    "several": (
        *("train.num_iterations=2", "train.minibatches=2", "train.learning_rate=5e-5"),
        *("train.warmup_ratio=0.3", "train.lr_scheduler_type=cosine"),
    ),
    # groups of several rows, whose passes wait for their backward passes; ranks have different numbers of them
    "kept": ("train.micro_batch_tokens=40", "train.gradient_checkpointing=true"),
    # the reference model is divided too: its passes, of which ranks have different numbers, are made in lockstep
    "reference": ("objective.kl_coef=0.1", "train.micro_batch_tokens=40"),
    "stale": ("rollout.staleness=1", "train.importance_correction=segment_truncate"),
    # groups are learnt from as they finish; at this learning rate it does not matter which update's weights drew them
    "arriving": ARRIVING,
    "served": (*ARRIVING, f'rollout.servers=["{os.environ.get("E3RL_SERVER", "")}"]'),
    # both ranks have every group and half of each row; attention's shares come from both
    "context": ("train.context_parallel=2", "train.micro_batch_tokens=90", "objective.kl_coef=0.1"),
    "adapters": ("model.lora_r=4", "objective.kl_coef=0.1"),  # their reference is the same model without them
}


def evenness(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A reward that a random model gets some of."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def settings(name: str) -> tuple[str, ...]:
    """The overrides of the run with this name."""
    parallel, _, variant = name.rstrip("+").partition("_")
    ended = variant == "half" and not name.endswith("+")
    own = (*VARIANTS[variant], f"train.parallel={parallel}", f"run.name={name.rstrip('+')}")
    return (*SETTINGS, *own, f"train.steps={STEPS // 2 if ended else STEPS}")


def note_rounds(directory: Path) -> None:
    """Write down how many groups came in each round of the steps that were learnt from as their groups came."""
    learn = Learner.learn_arriving

    def noted(learner: Learner, arriving: Iterable[Sequence[RewardedGroup]], update: int) -> Any:
        rounds: list[int] = []

        def counted() -> Iterator[Sequence[RewardedGroup]]:
            for groups in arriving:
                rounds.append(len(groups))
                yield groups

        found = learn(learner, counted(), update)
        with (directory / f"rounds-{dist.get_rank()}.txt").open("a") as file:
            print(*rounds, file=file)
        return found

    Learner.learn_arriving = noted  # type: ignore[method-assign]
    # a step that is complete by now is taken as it is; which are depends on the clock
    Prefetch.finished = lambda self, ranks: []  # type: ignore[method-assign]


def main(model: str, directory: Path, names: list[str]) -> None:
    note_rounds(directory)
    for name in names:
        own = Path(tempfile.mkdtemp())  # for the recipe's text
        overrides = [f"model.path={model}", f"run.output_dir={directory}", *settings(name)]
        if "E3RL_DIFFERENT_SEEDS" in os.environ:
            overrides.append(f"run.seed={os.environ['RANK']}")
        Trainer(lab_config(own, *overrides), resume=name.endswith("+")).train()
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
