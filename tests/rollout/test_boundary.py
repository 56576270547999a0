"""Segments that end where a token was a surprise, or its distribution wide (`rollout.boundary`)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from e3rl.config import ErasureConfig, RolloutConfig, build_config
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.errors import UserError
from e3rl.rollout.batches import run_groups
from e3rl.rollout.calibrate import boundary_levels
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.metric import toy_candidate
from e3rl.rollout.statistics import measured_by
from e3rl.types import Group
from tests.engine.models import tiny
from tests.rollout.worlds import MEAN_ONLY, levels, prompt, roll, rollout

ADAPTIVE = RolloutConfig(
    erase=False,
    num_generations=3,
    segment_length=5,
    max_segments=4,
    boundary="surprise",
    boundary_level=3.0,
    min_segment_length=2,
)


def _rolled(config: RolloutConfig, kind: type = RecomputeEngine) -> Group:
    engine = kind(tiny("Llama"), eos_ids=(0,), max_rows=4, cache_rows=4, max_length=64)
    [group] = run_groups(engine, [prompt()], GroupSettings(config, ErasureConfig(), seed=7))
    return group


@pytest.mark.parametrize("measure", ["surprise", "entropy"])
def test_a_segment_ends_behind_its_first_token_above_the_level(measure: str) -> None:
    """Not before min_segment_length, at L tokens at the latest, and the response at its limit."""
    plain = _rolled(replace(ADAPTIVE, boundary="length"))
    first = plain.trajectories[0].segments[0].candidate
    values = sorted(first.entropies.tolist()) if measure == "entropy" else sorted((-first.logprobs).tolist())
    level = (values[2] + values[3]) / 2  # two of its five tokens are above it
    group = _rolled(replace(ADAPTIVE, boundary=measure, boundary_level=level))
    sizes = set()
    for trajectory in group.trajectories:
        for segment in trajectory.segments:
            candidate = segment.candidate
            above = (candidate.entropies if measure == "entropy" else -candidate.logprobs) > level
            last = segment is trajectory.segments[-1]
            assert not above[1:-1].any()
            assert len(above) >= 2 or last
            assert above[-1] or len(above) == 5 or last
            sizes.add(len(above))
        assert len(trajectory.ids) == 20 or trajectory.finish == "stop"
    assert len(sizes) > 1


def test_what_the_boundary_cuts_is_drawn_again_behind_it() -> None:
    """The first segment is the beginning of what would have been drawn without a boundary: the same draw, cut."""
    plain, cut = (_rolled(replace(ADAPTIVE, boundary=b)) for b in ("length", "surprise"))
    for whole, parts in zip(plain.trajectories, cut.trajectories, strict=True):
        size = len(parts.segments[0].candidate.ids)
        assert whole.ids[:size].tolist() == parts.ids[:size].tolist()


def test_the_engine_with_a_cache_ends_segments_where_the_slow_one_does() -> None:
    fast, slow = _rolled(ADAPTIVE, TorchEngine), _rolled(ADAPTIVE)
    assert [t.segment_lengths for t in fast.trajectories] == [t.segment_lengths for t in slow.trajectories]
    assert [t.ids.tolist() for t in fast.trajectories] == [t.ids.tolist() for t in slow.trajectories]


def test_a_candidate_that_is_too_short_is_refused_where_there_is_no_boundary() -> None:
    short = toy_candidate((1.0, 1.0))
    for boundary in ("surprise", "length"):
        config = RolloutConfig(erase=False, num_generations=1, segment_length=4, boundary=boundary)
        group = GroupRollout(prompt(), GroupSettings(config, ErasureConfig(), seed=7), lambda event: None)
        group.start()
        if boundary == "length":
            with pytest.raises(RuntimeError, match="asked for 4 tokens or an end of sequence and returned 2"):
                group.deliver(0, short)
        else:
            group.deliver(0, short)
            assert group.committed_ids(0) == short.ids.tolist()


def test_calibration_remembers_the_boundary_and_says_levels() -> None:
    erasure = ErasureConfig()
    assert measured_by(ADAPTIVE, erasure)["rollout.boundary_level"] == 3.0
    assert "rollout.boundary" not in measured_by(RolloutConfig(), erasure)
    groups, _ = roll(levels({}, default=0.5), replace(MEAN_ONLY), rollout(erase=False))
    assert boundary_levels(list(groups.values()))[1] == "entropy: 20% above 0.5, 10% above 0.5, 5% above 0.5"


def test_vllm_has_no_boundary() -> None:
    with pytest.raises(UserError, match=r"rollout.boundary = 'entropy' needs rollout.engine = 'torch'"):
        build_config({"rollout": {"boundary": "entropy", "engine": "vllm"}})
