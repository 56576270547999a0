"""Groups made in two rounds: which beginnings are shared, and what was generated for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.train.collect import reward
from e3rl.train.state import group_settings
from e3rl.train.trainer import Trainer
from e3rl.types import Group
from e3rl_reproduce.resumed import GENERATED, TwoRounds, branched, pruned, reset, suspicion

PROMPTS, SIBLINGS, SEGMENTS = 3, 6, 4
JUDGED = (
    "rollout.erase=true",
    "erasure.baseline=static",
    "erasure.static_baseline=1",
    "erasure.eta=0",
    "erasure.max_erasures=0",
)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    settings = (
        "model.path=lab",
        "data.train=lab:ways:3",
        "data.eval=",
        f"rollout.num_generations={SIBLINGS}",
        "rollout.segment_length=2",
        f"rollout.max_segments={SEGMENTS}",
        f"train.prompts_per_step={PROMPTS}",
        "train.steps=1",
        f"run.output_dir={tmp_path}",
        "run.name=run",
        *JUDGED,
    )
    made = Trainer(load_config(find_recipe("lab"), overrides=settings))
    with made.run.scorer:
        yield made
    made.run.directory.release()


def _groups(trainer: Trainer, rollouts: TwoRounds) -> list[Group]:
    prompts = trainer.state.stream.take(PROMPTS)
    return list(rollouts.run(prompts, group_settings(trainer.run, trainer.state, 1), lambda: None))


def _generated(trainer: Trainer) -> int:
    [line] = (trainer.run_path / GENERATED).read_text().splitlines()
    assert json.loads(line)["step"] == 1
    return int(json.loads(line)["tokens"])


def _shared(one: object, other: object) -> int:
    """Segments at the front that are the same, to the last bit of their numbers."""
    pairs = list(zip(one.segments, other.segments, strict=False))
    same = [a.candidate == b.candidate for a, b in pairs]
    return same.index(False) if False in same else len(same)


def test_each_branch_leaves_its_trunk_after_a_segment(trainer: Trainer) -> None:
    groups, half, common, left = _groups(trainer, branched(trainer.run)), SIBLINGS // 2, 0, 0
    for group in groups:
        assert [t.sibling for t in group.trajectories] == list(range(SIBLINGS))
        for trunk, branch in zip(group.trajectories[:half], group.trajectories[half:], strict=True):
            shared = _shared(trunk, branch)
            assert shared >= 1
            common += sum(trunk.segment_lengths[:shared])
            left += shared < len(trunk.segments)
    everything = sum(t.committed_tokens for g in groups for t in g.trajectories)
    assert everything - common <= _generated(trainer) < everything  # a segment may be drawn again as it was
    assert left >= 3  # of 9: the model often draws what it drew before


def test_a_reset_goes_back_to_before_the_worst_step_of_a_wrong_response(trainer: Trainer) -> None:
    groups, half = _groups(trainer, reset(trainer.run)), SIBLINGS // 2
    seen, common = 0, 0
    for group in groups:
        [rewarded] = reward(trainer.run, [group])
        trunks = list(zip(group.trajectories, rewarded.rewards, strict=True))[:half]
        wrong = [t for t, value in trunks if not value.right] or [t for t, _ in trunks]
        for i, branch in enumerate(group.trajectories[half:]):
            begun = wrong[i % len(wrong)]
            worst = int(np.argmax([suspicion(s) for s in begun.segments]))
            assert _shared(begun, branch) >= worst
            common += sum(begun.segment_lengths[:worst])
            seen += worst > 0
        seen += 0 < len(wrong) < half
    assert seen  # some went back to a place inside a response
    everything = sum(t.committed_tokens for g in groups for t in g.trajectories)
    assert _generated(trainer) == everything - common  # no segment more was taken over


def test_pruning_goes_on_with_the_calmer_half_of_twice_as_many(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, first, asked = pruned(trainer.run), [], trainer.run.rollouts.run

    def watched(*args: object) -> Iterator[Group]:
        for group in asked(*args):
            first.append(group)
            yield group

    monkeypatch.setattr(trainer.run.rollouts, "run", watched)
    groups = _groups(trainer, rollouts)
    assert [len(g.trajectories) for g in groups] == [SIBLINGS] * PROMPTS
    of = {g.prompt.problem.id: g for g in first[:PROMPTS]}
    halves, shared = 0, 0
    for group in groups:
        begun = of[group.prompt.problem.id].trajectories
        assert len(begun) == 2 * SIBLINGS
        assert max(len(t.segments) for t in begun) == SEGMENTS // 2
        u = [float(np.mean([suspicion(s) for s in t.segments])) for t in begun]
        for t, place in zip(group.trajectories, np.argsort(u, kind="stable")[:SIBLINGS], strict=True):
            kept = begun[place]
            assert _shared(t, kept) == len(kept.segments)
            shared += kept.committed_tokens
        halves += sum(t.committed_tokens for t in begun)
    everything = sum(t.committed_tokens for g in groups for t in g.trajectories)
    assert _generated(trainer) == halves + everything - shared


def test_a_step_of_training_learns_from_such_groups(trainer: Trainer) -> None:
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    trainer.run = replace(trainer.run, rollouts=branched(trainer.run))
    trainer.train()
    [line] = map(json.loads, (trainer.run_path / "metrics.jsonl").read_text().splitlines())
    assert _generated(trainer) < line["tokens_total"]  # its groups hold shared beginnings twice
    assert any((p.detach() != before[name]).any() for name, p in trainer.policy.model.named_parameters())
