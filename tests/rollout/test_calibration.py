"""Calibration foretells from plain rollouts what erasable rollouts then do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.torch.engine import TorchEngine
from e3rl.rollout.batches import run_groups
from e3rl.rollout.calibrate import Setting, assess, grid, recommend
from e3rl.rollout.group import GroupSettings
from e3rl.types import Group, Problem, Prompt
from tests.engine.models import EOS, tiny

PROMPTS = [Prompt(Problem(f"p{i}", "x"), (2 + i, 5, 9)) for i in range(4)]
ROLLOUT = RolloutConfig(num_generations=4, segment_length=4, max_segments=3, max_rows=16, erase=False)


def _roll_out(rollout: RolloutConfig, erasure: ErasureConfig) -> list[Group]:
    engine = TorchEngine(tiny("Llama"), eos_ids=EOS, max_rows=16, cache_rows=32, max_length=32)
    groups = run_groups(engine, PROMPTS, GroupSettings(rollout, erasure, seed=3))
    return sorted(groups, key=lambda g: g.prompt.problem.id)


@pytest.mark.parametrize("erasure", [ErasureConfig(kappa0=0.3), ErasureConfig(kappa0=0.8, perturbation_weight=1.0)])
def test_the_share_erased_is_that_of_a_real_run_where_nothing_was_redrawn_before(erasure: ErasureConfig):
    """Of first segments: the same draws, the same statistics, so the same verdicts."""
    plain = _roll_out(replace(ROLLOUT, max_segments=1), erasure)
    real = _roll_out(replace(ROLLOUT, max_segments=1, erase=True), erasure)
    erased = sum(e.judgement.attempt == 0 for g in real for t in g.trajectories for e in t.erasures)
    assert assess(plain, erasure).erase_share == erased / 16
    assert 0 < erased < 16


def test_bounds_of_r_hold_what_a_stricter_threshold_would_do():
    plain = _roll_out(ROLLOUT, ErasureConfig())
    shares = [assess(plain, ErasureConfig(kappa0=k)) for k in (0.0, 0.5, 1.0, 2.0)]
    assert [s.erase_share for s in shares] == sorted((s.erase_share for s in shares), reverse=True)
    for setting in shares:
        assert setting.erase_share <= setting.r_low <= setting.r_high
    assert assess(plain, ErasureConfig(max_erasures=0)) == Setting(ErasureConfig(max_erasures=0), 0.0, 0.0, 0.0)


def test_the_bounds_by_hand():
    """Eta 0 keeps the threshold: with share p erased at each of 2 attempts, p + p^2 at best and 2p at worst."""
    plain = _roll_out(ROLLOUT, ErasureConfig())
    setting = assess(plain, ErasureConfig(kappa0=0.5, eta=0.0, max_erasures=2))
    p = setting.erase_share
    assert setting.r_low == pytest.approx(p + p * p)
    assert setting.r_high == pytest.approx(2 * p)


def test_the_grid_leaves_out_settings_without_any_term():
    bare = ErasureConfig(base_weight=0, gradient_weight=0, extremum_weight=0)
    assert [(e.kappa0, e.perturbation_weight) for e in grid(bare, (1.0, 2.0), (0.0, 1.0))] == [(1.0, 1.0), (2.0, 1.0)]
    assert len(grid(ErasureConfig(), (1.0, 2.0), (0.0, 1.0))) == 4


@pytest.mark.parametrize("baseline", ["quantile", "static"])
def test_a_baseline_without_kappa_leaves_nothing_to_compare(baseline: str):
    erasure = ErasureConfig(baseline=baseline)
    assert grid(erasure, (1.0, 2.0), (0.0, 1.0)) == [erasure]


def test_the_setting_nearest_the_target_is_recommended_and_the_stricter_of_equals():
    settings = [Setting(ErasureConfig(kappa0=k), share, 0, 0) for k, share in ((1, 0.9), (2, 0.75), (3, 0.25))]
    assert recommend(settings, 0.5).erasure.kappa0 == 3
    assert recommend(settings, 0.8).erasure.kappa0 == 2
