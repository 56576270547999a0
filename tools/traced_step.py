"""One row of the embedded model's problems, taken through a whole training step: what tools/trace_row.py writes about."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.lab.problems import generate
from e3rl.models import Policy, load_policy
from e3rl.objectives import build
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.learner import Learner, Update
from e3rl.train.ledger import ledger_rows
from e3rl.train.lessons import Lesson
from e3rl.types import Group, Prompt, RewardedGroup

SIBLINGS = 4
LEVEL = 4


@dataclass(frozen=True)
class Trace:
    """One problem on its way, and the learner's work on it."""

    row: dict[str, Any]
    config: Config
    policy: Policy
    rewarded: RewardedGroup
    lessons: list[Lesson]
    update: Update
    before: list[float]
    after: list[float]
    ledger: list[dict[str, Any]]

    @property
    def group(self) -> Group:
        return self.rewarded.group

    @property
    def star(self) -> int:
        """The sibling that is followed: the first whose erasure led to a right answer."""
        pairs = zip(self.group.trajectories, self.rewarded.rewards, strict=True)
        return next(t.sibling for t, reward in pairs if t.erasures and reward.value)

    def text(self, ids: Iterable[int]) -> str:
        return str(self.policy.tokenizer.decode(list(ids), skip_special_tokens=True))


def rows() -> list[dict[str, Any]]:
    """Lab problems as they would stand in a JSONL file."""
    return [
        {"id": p.id, "prompt": p.prompt, "answer": p.answer, **p.columns} for p in generate("chain", LEVEL, "train", 40)
    ]


def read(row: dict[str, Any], config: Config, policy: Policy) -> Prompt:
    """Row → Problem → Prompt, through a file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        problems = load_problems(str(path), config=config.data, split="train")
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    return render_prompts(problems, policy.tokenizer, config.data, **limits)[0]


def roll_out(prompt: Prompt, config: Config, policy: Policy, scorer: Scorer) -> RewardedGroup:
    """Prompt → group of trajectories → rewards."""
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, len(prompt.ids))
    (group,) = run_groups(engine, [prompt], GroupSettings(config.rollout, config.erasure, config.run.seed, step=1))
    texts = [policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in group.trajectories]
    return RewardedGroup(group, tuple(scorer.score(group.trajectories, texts)))


def is_telling(item: RewardedGroup) -> bool:
    """Right and wrong answers, and an erasure on the way to a right one."""
    rewards = {r.value for r in item.rewards}
    return len(rewards) > 1 and any(
        t.erasures and r.value for t, r in zip(item.group.trajectories, item.rewards, strict=True)
    )


def logprobs_of(learner: Learner, rewarded: RewardedGroup) -> list[float]:
    """Log-probability of each sibling's response under the policy as it is now."""
    return [float(x.scores.logprobs_T.sum()) for x in learner.prepare([rewarded]) if not x.sequence.erased]


@functools.cache
def trace() -> Trace:
    """The first problem whose group shows something, through a whole step."""
    config = load_config(
        find_recipe("demo"), [], [f"rollout.num_generations={SIBLINGS}", "rollout.max_segments=6", "model.device=cpu"]
    )
    policy = load_policy(config.model)
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        candidates = ((row, roll_out(read(row, config, policy), config, policy, scorer)) for row in rows())
        row, rewarded = next((r, item) for r, item in candidates if is_telling(item))
    learner = Learner(policy, build(config.objective), config, updates=1)
    lessons = learner.prepare([rewarded])
    kept = [x for x in lessons if not x.sequence.erased]
    before = [float(x.scores.logprobs_T.sum()) for x in kept]
    update = learner.update(lessons, 0)
    after = logprobs_of(learner, rewarded)
    ledger = ledger_rows(1, [rewarded], lessons, policy.tokenizer).to_pylist()
    return Trace(row, config, policy, rewarded, lessons, update, before, after, ledger)
