"""The method in one file makes the library's decisions and has its gradients, on the same problems and draws."""

from __future__ import annotations

import copy
import functools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from e3rl.config import Config, ErasureConfig, ModelConfig, ObjectiveConfig, RolloutConfig
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.engine.requests import uniforms
from e3rl.equations.policy import segment_sums
from e3rl.lab import lab_directory
from e3rl.lab.problems import generate
from e3rl.models import load_policy
from e3rl.objectives import build
from e3rl.plugins import load
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.learner import Learner
from e3rl.train.lessons import Lesson
from e3rl.train.metrics import Means
from e3rl.types import Draw, Group, Prompt, Reward, RewardedGroup, Trajectory

FILE = Path(__file__).parents[2] / "examples" / "one_file_e3rl.py"
load("example", f"{FILE}:train", {})
one: Any = sys.modules[FILE.stem]

SEED, STEP = 5, 2
HOT = 2.0  # the embedded model is sure of itself: at 1 its siblings are alike, and their advantages cancel
WINDOW = 7  # shorter than the responses, so that it matters
WEIGHTS = {
    "paper": {},
    "perturbation": {"base_weight": 0.0, "gradient_weight": 0.0, "extremum_weight": 0.0, "perturbation_weight": 1.0},
    "every term": {"perturbation_weight": 0.7, "kappa0": 0.4, "kappa1": 0.3, "smoothing_window": 2, "max_erasures": 2},
}
REWARDS = [1.0, 0.0, 1.0]


@functools.cache
def policy() -> Any:
    return load_policy(ModelConfig(device="cpu"))


@functools.cache
def eager() -> Any:
    return AutoModelForCausalLM.from_pretrained(lab_directory(), attn_implementation="eager")


def config(**erasure: Any) -> Config:
    rollout = RolloutConfig(num_generations=3, segment_length=12, max_segments=4, temperature=HOT)
    return Config(rollout=rollout, erasure=ErasureConfig(**erasure))


def prompts() -> list[Prompt]:
    found = generate("chain", 3, "heldout", 2)
    limits = {"context_limit": policy().context_length, "completion_limit": 48}
    return render_prompts(found, policy().tokenizer, config().data, **limits)


def by_library(which: str) -> list[Group]:
    settings, asked = config(**WEIGHTS[which]), prompts()
    engine = build_engine(settings.rollout, policy().model, policy().eos_ids, max(len(p.ids) for p in asked))
    drawn = GroupSettings(settings.rollout, settings.erasure, SEED, step=STEP)
    groups = {g.prompt.problem.id: g for g in run_groups(engine, asked, drawn)}
    return [groups[p.problem.id] for p in asked]


def by_one_file(which: str) -> list[list[Any]]:
    def of(prompt: Prompt) -> list[Any]:
        def draws(sibling: int, segment: int, attempt: int) -> list[float]:
            return list(uniforms(Draw(SEED, STEP, prompt.problem.id, sibling, segment, attempt), 12))

        return one.roll_out(eager(), list(prompt.ids), frozenset(policy().eos_ids), draws, settings(which))

    return [of(prompt) for prompt in prompts()]


def settings(which: str) -> Any:
    return one.Settings(siblings=3, max_segments=4, temperature=HOT, attribution_window=WINDOW, **WEIGHTS[which])


rollouts = functools.cache(lambda which: (by_library(which), by_one_file(which)))


def decisions_of_library(trajectory: Trajectory) -> list[tuple[Any, ...]]:
    judged = [(s.index, s.judgement, s.candidate) for s in trajectory.segments]
    judged += [(e.index, e.judgement, e.candidate) for e in trajectory.erasures]
    judged.sort(key=lambda x: (x[0], x[1].attempt))
    return [
        (n, j.attempt, str(j.verdict), tuple(c.ids.tolist()), j.uncertainty.total, j.threshold.total)
        for n, j, c in judged
    ]


def decisions_of_one_file(sibling: Any) -> list[tuple[Any, ...]]:
    return [
        (d.segment, d.attempt, d.verdict, tuple(d.candidate.ids), d.uncertainty, d.threshold) for d in sibling.decisions
    ]


@pytest.mark.parametrize("which", WEIGHTS)
def test_every_candidate_gets_the_same_verdict_for_the_same_reason(which: str):
    seen = set()
    for group, siblings in zip(*rollouts(which), strict=True):
        for trajectory, sibling in zip(group.trajectories, siblings, strict=True):
            theirs, ours = decisions_of_library(trajectory), decisions_of_one_file(sibling)
            assert [d[:4] for d in ours] == [d[:4] for d in theirs]
            numbers = torch.tensor([[*d[4:]] for d in ours]), torch.tensor([[*d[4:]] for d in theirs])
            torch.testing.assert_close(*numbers, atol=1e-5, rtol=1e-5)
            seen |= {d[2] for d in ours}
    assert {"commit", "erase"} <= seen


def learner() -> Learner:
    whole = replace(config(), objective=ObjectiveConfig("e3rl", {"attribution_window": WINDOW}))
    own = replace(policy(), model=copy.deepcopy(policy().model))
    return Learner(own, build(whole.objective), whole, updates=1)


def rewarded(groups: list[Group]) -> list[RewardedGroup]:
    return [RewardedGroup(g, tuple(Reward(r, {}) for r in REWARDS)) for g in groups]


def moved(model: Any) -> Any:
    """The model after a step, so that ratios differ from 1 and some are clipped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.006)
    return model


def segment_values(lesson: Lesson) -> torch.Tensor:
    segments = lesson.sequence.segments_T
    count = int(segments.max()) + 1
    sizes = segment_sums(torch.ones(len(segments)), segments, count)
    return segment_sums(lesson.advantages_T, segments, count) / sizes


def test_segments_get_the_same_advantages():
    groups, by_hand = rollouts("paper")
    lessons = learner().prepare(rewarded(groups))
    for index, siblings in enumerate(by_hand):
        lengths = [[len(c.ids) for c in x.segments] for x in siblings]
        with torch.no_grad():
            shares = [one.score(eager(), list(prompts()[index].ids), x.ids, settings("paper"))[1] for x in siblings]
        found = one.segment_advantages(REWARDS, shares, lengths, settings("paper"))
        assert found.abs().max() > 0.5
        for lesson in (x for x in lessons if x.sequence.group == index):
            expected = segment_values(lesson)
            torch.testing.assert_close(
                found[lesson.sequence.sibling, : len(expected)].float(), expected, atol=1e-4, rtol=1e-4
            )


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_loss_has_the_same_value_and_gradient_beside_the_old_policy():
    """After a step: ratios differ from 1, the clip cuts, and the reference policy is another."""
    groups, by_hand = rollouts("paper")
    pupil, s = learner(), settings("paper")
    lessons = pupil.prepare(rewarded(groups))
    moved(pupil._policy.model)
    means = Means()
    pupil._accumulate(lessons, means)
    expected = means.values()
    assert 0 < expected["clip_fraction"] < 1

    model, total = moved(copy.deepcopy(eager())), 0.0
    for index, siblings in enumerate(by_hand):
        prompt = list(prompts()[index].ids)
        with torch.no_grad():
            scored = [one.score(eager(), prompt, x.ids, s) for x in siblings]
        lengths = [[len(c.ids) for c in x.segments] for x in siblings]
        advantages = one.segment_advantages(REWARDS, [shares for _, shares in scored], lengths, s)
        for x, (old, _), row, sizes in zip(siblings, scored, advantages, lengths, strict=True):
            logprobs, _ = one.score(model, prompt, x.ids, s)
            loss = one.sequence_loss(logprobs, old, old, row, sizes, s) / (len(siblings) * len(by_hand))
            loss.backward()
            total += float(loss.detach())
    assert total == pytest.approx(expected["loss"], abs=1e-5, rel=1e-5)
    found, wanted = gradient(model), gradient(pupil._policy.model)
    assert wanted.norm() > 0.1
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_group_has_the_same_gradient_at_the_old_policy():
    groups, by_hand = rollouts("paper")
    pupil = learner()
    pupil._accumulate(pupil.prepare(rewarded(groups)), Means())
    model = copy.deepcopy(eager())
    for prompt, siblings in zip(prompts(), by_hand, strict=True):
        (one.group_loss(model, eager(), list(prompt.ids), siblings, REWARDS, settings("paper")) / 2).backward()
    found, wanted = gradient(model), gradient(pupil._policy.model)
    assert wanted.norm() > 0.1
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_equal_rewards_teach_nothing():
    shares = [torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])]
    lengths = [[1, 1], [1, 1]]
    assert not one.segment_advantages([1.0, 1.0], shares, lengths, one.Settings()).any()
    assert one.segment_advantages([1.0, 0.0], shares, lengths, one.Settings()).any()


def test_the_defaults_are_the_library_s():
    s, theirs = one.Settings(), {**vars(RolloutConfig()), **vars(ErasureConfig()), **vars(build(Config().objective))}
    shared = vars(s).keys() & theirs.keys() - {"segment_length", "max_segments"}  # the embedded model's are shorter
    assert len(shared) > 12
    assert {name: getattr(s, name) for name in shared} == {name: theirs[name] for name in shared}
    assert s.clip == theirs["clip_low"] == theirs["clip_high"]


def test_it_is_short_and_imports_no_algorithm():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    imported = re.findall(r"^(?:from|import) (e3rl[\w.]*)", text, re.MULTILINE)
    assert imported
    assert all(module.startswith("e3rl.lab") for module in imported)


def test_it_runs(capsys: pytest.CaptureFixture[str]):
    before = torch.random.get_rng_state()
    one.train(one.Settings(siblings=2, max_segments=3), steps=2, prompts=1)
    said = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d\.\d{3}", "#", line) for line in said] == [
        f"step {step}  reward #  erase rate #  r #" for step in (1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)  # no random number but those of its draws
