"""What an objective reports besides its loss, worked by hand."""

from __future__ import annotations

import math
import random

import torch

from e3rl.objectives.metrics import sign_flips
from tests.objectives.support import batch_of, make, random_group


def test_sign_flips_counts_tokens_against_their_reward() -> None:
    """Sibling 0 is above the mean, so its negative token is a flip; in sibling 1 the positive one. Padding: never."""
    advantages_GT = torch.tensor([[1.0, -0.5, 0.0], [0.5, -1.0, 9.0]])
    mask_GT = torch.tensor([[True, True, True], [True, True, False]])
    assert sign_flips(advantages_GT, torch.tensor([1.0, 0.0]), mask_GT) == (2.0, 5.0)


def test_a_response_at_the_mean_is_not_counted() -> None:
    advantages_GT, mask_GT = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool)
    assert sign_flips(advantages_GT, torch.tensor([1.0, 0.5, 0.0]), mask_GT) == (2.0, 4.0)


def test_clip_fraction_by_segment() -> None:
    """Segment 0: ratios e^0.5 with A > 0 (clipped) and 1. Segment 1: e^-0.5 with A < 0 (clipped), and one lacks it."""
    common = {"ref": [-1.0, -1.0], "entropy": [0.0, 0.0], "share": [0.5, 0.5], "group_size": 2}
    long = {**common, "old": [-1.0, -1.0], "logp": [-0.5, -1.5], "segment": [0, 1], "advantage": [1.0, -1.0]}
    short = {k: v[:1] if isinstance(v, list) else v for k, v in long.items()} | {"logp": [-1.0]}
    metrics = make("e3rl").loss(batch_of([long, short])).metrics
    assert metrics["clip_fraction/segment_0"] == (1.0, 2.0)
    assert metrics["clip_fraction/segment_1"] == (1.0, 1.0)
    assert metrics["clip_fraction"] == (2.0, 3.0)
    ratios = math.exp(0.5) + 1 + math.exp(-0.5)
    torch.testing.assert_close(torch.tensor(metrics["ratio"]), torch.tensor((ratios, 3.0)))


def test_where_the_smaller_term_is_not_the_clipped_one_nothing_is_cut() -> None:
    """Ratios e^0.5 with A < 0 and e^-0.5 with A > 0 lie outside the clip range and keep their gradient."""
    common = {"ref": [-1.0, -1.0], "entropy": [0.0, 0.0], "share": [0.5, 0.5], "group_size": 1}
    row = {**common, "old": [-1.0, -1.0], "logp": [-0.5, -1.5], "segment": [0, 1], "advantage": [-1.0, 1.0]}
    for name in ("e3rl", "grpo"):
        assert make(name).loss(batch_of([row])).metrics["clip_fraction"] == (0.0, 2.0)


def test_erased_candidates_have_no_kl_in_the_metrics() -> None:
    group = random_group(random.Random(0), 2)
    erased = {**group[0], "erased": True}
    alone, beside = (make("e3rl").loss(batch_of(s)).metrics["kl"] for s in ([group[1]], [group[1], erased]))
    assert alone == beside
    assert alone[0] > 0
