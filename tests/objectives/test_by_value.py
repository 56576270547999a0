"""Every objective against the plain-Python reference, and against numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch

from e3rl.errors import UserError
from e3rl.objectives.base import GroupSignals
from tests.objectives import reference
from tests.objectives.support import batch_of, loss_of, make, random_group, signals_of, tokens

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5]
SEEDS = range(8)


def two_groups(seed: int, **extra: object) -> list[dict]:
    rng = random.Random(seed)
    return random_group(rng, 5) + random_group(rng, 3)


def assert_tokens(actual: list[list[float]], expected: list[list[float]]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("allocation", ["causal", "sequence", "anchored"])
def test_e3rl_advantages(seed: int, allocation: str) -> None:
    group = random_group(random.Random(seed), 5)
    actual = make("e3rl", allocation=allocation).advantages(signals_of(group, REWARDS))
    assert_tokens(tokens(actual, group), reference.e3rl_advantages(group, REWARDS, allocation, 1e-4))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", ["segment", "segment_mean"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_e3rl_loss(seed: int, ratio: str, kl_coef: float) -> None:
    sequences = two_groups(seed)
    for s in sequences:
        s["advantage"] = [math.sin(seed + 3 * n) for n in s["segment"]]
    actual = make("e3rl", ratio=ratio, kl_coef=kl_coef).loss(batch_of(sequences, groups=2)).value
    assert actual.item() == pytest.approx(reference.e3rl_loss(sequences, 2, kl_coef, 0.2, 0.2, ratio), abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_e3rl_contrast(seed: int) -> None:
    """An erased candidate adds its surrogate, weighs like a sequence of its group and has no KL."""
    sequences = two_groups(seed)
    erased = random_group(random.Random(seed + 100), 1)[0]
    erased |= {"erased": True, "segment": [2] * len(erased["old"]), "group_size": 5}
    erased["advantage"] = [-0.7] * len(erased["old"])
    objective = make("e3rl", erased="contrast", contrast_weight=0.7)
    assert objective.erased_advantage(1.0) == -0.7
    assert objective.erased_advantage(0.0) == 0.0
    actual = objective.loss(batch_of([*sequences, erased], groups=2)).value
    assert actual.item() == pytest.approx(reference.e3rl_loss([*sequences, erased], 2, 0.04, 0.2, 0.2), abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_family(seed: int) -> None:
    sequences = two_groups(seed)
    batch = batch_of(sequences, groups=2)

    def value(name: str, **options: object) -> float:
        return make(name, **options).loss(batch).value.item()

    def near(expected: float) -> object:
        return pytest.approx(expected, abs=1e-10)

    assert value("grpo") == near(reference.token_mean_loss(sequences, 0.8, 1.2, 0.04))
    assert value("grpo", average="sequence") == near(reference.sequence_mean_loss(sequences, 0.8, 1.2, 0.04))
    assert value("dr_grpo") == near(reference.limit_loss(sequences, 0.8, 1.2, 0.0, 12))
    assert value("dapo") == near(reference.token_mean_loss(sequences, 0.8, 1.28, 0.0))
    assert value("erpo") == near(reference.token_mean_loss(sequences, 0.8, 1.2, 0.04))
    assert value("gspo", kl_coef=0.01) == near(reference.gspo_loss(sequences, 1 - 3e-4, 1 + 4e-4, 0.01))
    assert value("sapo") == near(reference.sapo_loss(sequences, 1.0, 1.05))
    assert value("cispo", ratio_cap=1.1, kl_coef=0.04) == near(reference.cispo_loss(sequences, 1.1, 0.04))
    capped = reference.capped_mean_loss(sequences, 0.8, 1.2, 0.04, 1.3)
    assert value("grpo", ratio_cap=1.3, kl_ratio=True) == near(capped)
    assert capped not in (value("grpo", ratio_cap=1.3), value("grpo", kl_ratio=True))
    assert value("rloo", clip_high=0.3) == near(reference.rloo_loss(sequences, 0.8, 1.3))
    assert value("luspo", kl_coef=0.04) == near(reference.luspo_loss(sequences, 1 - 3e-4, 1 + 4e-4, 0.04))
    assert value("vespo", kl_coef=0.04) == near(reference.vespo_loss(sequences, 0.04))


@pytest.mark.parametrize("seed", SEEDS)
def test_group_advantages(seed: int) -> None:
    group = random_group(random.Random(seed), 5)
    whole = reference.group_advantages(REWARDS, 1e-4)
    for name in ("grpo", "dapo", "gspo", "sapo", "bapo", "cispo", "luspo", "vespo"):
        actual = tokens(make(name).advantages(signals_of(group, REWARDS)), group)
        assert_tokens(actual, [[a] * len(s["old"]) for a, s in zip(whole, group, strict=True)])
    actual = tokens(make("dr_grpo").advantages(signals_of(group, REWARDS)), group)
    assert_tokens(actual, [[r - 0.5] * len(s["old"]) for r, s in zip(REWARDS, group, strict=True)])
    for name in ("grpo", "dapo"):
        undivided = tokens(make(name, scale_rewards="none").advantages(signals_of(group, REWARDS)), group)
        assert_tokens(undivided, actual)
    for kl_coef in (0.0, 0.05):
        expected = reference.rloo_advantages(group, REWARDS, kl_coef)
        actual = tokens(make("rloo", kl_coef=kl_coef).advantages(signals_of(group, REWARDS)), group)
        assert_tokens(actual, [[a] * len(s["old"]) for a, s in zip(expected, group, strict=True)])


@pytest.mark.parametrize("seed", SEEDS)
def test_erpo_advantages(seed: int) -> None:
    group = random_group(random.Random(seed), 5)
    o = {"gamma": 1.3, "buckets": 3, "beta_progress": 0.5, "sigma_target": 0.8, "eta": 0.4, "eps": 1e-4}
    objective = make("erpo", **{("advantage_eps" if k == "eps" else k): v for k, v in o.items()})
    actual = tokens(objective.advantages(signals_of(group, REWARDS)), group)
    assert_tokens(actual, reference.erpo_advantages(group, REWARDS, o))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", [0.3, 0.5, 0.6, 0.95])
def test_bapo(seed: int, target: float) -> None:
    sequences = random_group(random.Random(seed), 6, drift=1.2)
    batch = batch_of(sequences)
    low, high = reference.bapo_bounds(sequences, target)
    loss = make("bapo", target=target).loss(batch)
    assert loss.metrics["bound_low"][0] == pytest.approx(low)
    assert loss.metrics["bound_high"][0] == pytest.approx(high)
    assert loss.value.item() == pytest.approx(reference.token_mean_loss(sequences, low, high, 0.0), abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
@pytest.mark.parametrize("limit", [1e-4, 0.02])
def test_disco(seed: int, score: str, limit: float) -> None:
    """With the larger limit some responses lie within it, and cost nothing."""
    group = random_group(random.Random(seed), 5)
    objective = make("disco", score=score, tau=2.0, kl_limit=limit)
    expected = reference.disco_advantages(group, REWARDS, 2.0, score)
    actual = tokens(objective.advantages(signals_of(group, REWARDS)), group)
    assert_tokens(actual, [[a] * len(s["old"]) for a, s in zip(expected, group, strict=True)])
    loss = objective.loss(batch_of(group)).value.item()
    assert loss == pytest.approx(reference.disco_loss(group, 1, score, limit, 1e3), rel=1e-10)


def test_disco_gradient_is_that_of_the_discriminative_objective() -> None:
    """On-policy, sum A_i score_i has the gradient of mean s+ - tau log mean exp(s-/tau), which is what DisCO states."""
    group = random_group(random.Random(3), 5, drift=0.0)
    objective, tau = make("disco", tau=0.5), 0.5
    for s, row in zip(group, objective.advantages(signals_of(group, REWARDS)).tolist(), strict=True):
        s["advantage"] = row[: len(s["old"])]
    batch = batch_of(group)
    scores_S = batch.logprobs_ST.sum(-1) / batch.mask_ST.sum(-1)
    right_S = torch.tensor(REWARDS) > 0
    stated = tau * (scores_S[~right_S] / tau).exp().mean().log() - scores_S[right_S].mean()
    expected = torch.autograd.grad(stated, batch.logprobs_ST)[0].where(batch.mask_ST, 0.0)
    actual = torch.autograd.grad(objective.loss(batch).value, batch.logprobs_ST)[0]
    torch.testing.assert_close(actual, expected)


GRADIENTS = [
    ("e3rl", {}),
    ("e3rl", {"ratio": "segment_mean", "kl_coef": 0.0}),
    ("grpo", {}),
    ("dr_grpo", {}),
    ("dapo", {}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.1}),
    ("sapo", {"kl_coef": 0.1}),
    ("erpo", {}),
    ("bapo", {}),
    ("disco", {}),
    ("disco", {"score": "likelihood_ratio"}),
    ("sft", {}),
    ("vanilla", {}),
]


@pytest.mark.parametrize(("name", "options"), GRADIENTS)
def test_gradients_are_numeric_gradients(name: str, options: dict) -> None:
    objective, batch = make(name, **options), batch_of(two_groups(5), groups=2)
    assert torch.autograd.gradcheck(loss_of(objective, batch), batch.logprobs_ST, eps=1e-7, atol=1e-6)


# Worked by hand: two siblings of two tokens each, rewards 1 and 0.


def pair(**extra: list[list[float]]) -> list[dict]:
    """Old log-probs -1 everywhere; policy ratios 2 and 1 for the first sibling, 1/2 and 1 for the second."""
    half = math.log(2.0)
    rows = [
        {"old": [-1.0, -1.0], "logp": [-1.0 + half, -1.0], "share": [0.25, 0.75]},
        {"old": [-1.0, -1.0], "logp": [-1.0 - half, -1.0], "share": [0.5, 0.5]},
    ]
    common = {"segment": [0, 1], "entropy": [0.5, 0.5], "ref": [-1.0, -1.0], "advantage": [0.0, 0.0], "group_size": 2}
    return [{**common, **row, **{k: v[i] for k, v in extra.items()}} for i, row in enumerate(rows)]


def test_e3rl_advantages_by_hand() -> None:
    """R = (0.25, 0.75) and (0, 0): mean 0.125 and 0.375, population std the same, so A = +-1 in both segments."""
    advantages = make("e3rl", advantage_eps=1e-12).advantages(signals_of(pair(), [1.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64))


def test_e3rl_anchored_by_hand() -> None:
    """A = +-1 over the sequence; times N = 2 and the shares."""
    objective = make("e3rl", allocation="anchored", advantage_eps=1e-12)
    advantages = objective.advantages(signals_of(pair(), [1.0, 0.0]))
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 1.5], [-1.0, -1.0]], dtype=torch.float64))


def test_e3rl_can_turn_a_right_answer_negative() -> None:
    """Rewards 1 and 1/2, but the first sibling looked elsewhere: R = 0.25 against 0.5 x 0.9 = 0.45 in segment 0."""
    group = pair(share=[[0.25, 0.75], [0.9, 0.1]])
    causal = make("e3rl", advantage_eps=1e-12).advantages(signals_of(group, [1.0, 0.5]))
    torch.testing.assert_close(causal, torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))


def test_losses_by_hand() -> None:
    """A = 1 and -1. Sibling 0: min(2, 1.2) + 1 = 2.2; sibling 1: -max(0.5, 0.8) - 1 = -1.8. No KL."""
    batch = batch_of(pair(advantage=[[1.0, 1.0], [-1.0, -1.0]]))
    assert make("e3rl", kl_coef=0.0).loss(batch).value.item() == pytest.approx(-(2.2 - 1.8) / 2)
    assert make("grpo", kl_coef=0.0).loss(batch).value.item() == pytest.approx(-(2.2 - 1.8) / 4)
    assert make("dr_grpo").loss(batch).value.item() == pytest.approx(-(2.2 - 1.8) / 24)
    assert make("dapo").loss(batch).value.item() == pytest.approx(-(2.28 - 1.8) / 4)
    # GSPO: ratios sqrt(2) and sqrt(1/2), held at 1.0004 and 0.9997
    assert make("gspo").loss(batch).value.item() == pytest.approx(-(1.0004 - 0.9997) / 2)
    # with KL to the reference (log-probs -1): k3 = 1/2 + ln 2 - 1 and 2 - ln 2 - 1, twice 0: together 0.5
    assert make("e3rl", kl_coef=0.1).loss(batch).value.item() == pytest.approx(-(2.2 - 1.8 - 0.05) / 2)


def test_erpo_by_hand() -> None:
    """Equal entropies: W = 1/2. s = +-1 in one bucket, so s~ = s; sgn A = +-1; Psi = (1, -1), (-1, 1).

    A = +-1/sqrt(2); A + Psi/sqrt(2) = (2, 0), (-2, 0) / sqrt(2), mean 0 and standard deviation 1.
    """
    group = pair(ref=[[-2.0, 0.0], [-2.0, 0.0]])
    objective = make("erpo", buckets=1, eta=2**-0.5, advantage_eps=1e-12)
    expected = [[2**0.5, 0.0], [-(2**0.5), 0.0]]
    assert_tokens(tokens(objective.advantages(signals_of(group, [1.0, 0.0])), group), expected)


def test_bapo_by_hand() -> None:
    """Ratios 2, 1 with A = 1 and 1/2, 1 with A = -2: positive 1 + c_high against 2 (1 + c_low) = 3.2 with c_low = 0.6.

    Share 1/2 needs c_high = 2.2, above the ratio of 2: never reached, so both bounds run to their limits. Share 0.46
    needs 1 + c_high >= 3.2 x 0.46/0.54 = 2.7259: the first step there is c_high = 1.75.
    """
    batch = batch_of(pair(advantage=[[1.0, 1.0], [-2.0, -2.0]]))
    metrics = make("bapo", target=0.5).loss(batch).metrics
    assert (metrics["bound_low"][0], metrics["bound_high"][0]) == pytest.approx((0.9, 3.0))
    metrics = make("bapo", target=0.46).loss(batch).metrics
    assert (metrics["bound_low"][0], metrics["bound_high"][0]) == pytest.approx((0.6, 1.75))
    even = batch_of(pair(advantage=[[1.0, 1.0], [-1.0, -1.0]], logp=[[-1.0, -1.0]] * 2))
    metrics = make("bapo", target=0.5).loss(even).metrics  # a share of just the target is enough
    assert (metrics["bound_low"][0], metrics["bound_high"][0]) == pytest.approx((0.6, 1.2))


@pytest.mark.parametrize("ratio", ["segment", "segment_mean"])
def test_e3rl_looks_away_from_tokens_outside_the_mask(ratio: str) -> None:
    """A segment that the mask cuts in two is its other half, and one outside it is no segment."""
    batch = batch_of(random_group(random.Random(4), 5))
    mask_ST = batch.mask_ST & (torch.arange(batch.mask_ST.shape[1]) >= 6)
    cut = dataclasses.replace(batch, mask_ST=mask_ST)
    unknown = dataclasses.replace(cut, segments_ST=batch.segments_ST.masked_fill(~mask_ST, -1))
    found, expected = (make("e3rl", ratio=ratio).loss(b) for b in (cut, unknown))
    assert found.value.item() == pytest.approx(expected.value.item())
    assert found.metrics == expected.metrics
    assert found.value.item() != pytest.approx(make("e3rl", ratio=ratio).loss(batch).value.item())


def test_disco_by_hand() -> None:
    """One right answer, two wrong ones with scores -1 and -1 - ln 3 at tau 1: weights 3/4 and 1/4."""
    group = pair() + pair(old=[[-1.0 - math.log(3.0)] * 2, [-1.0, -1.0]])[:1]
    advantages = make("disco", tau=1.0).advantages(signals_of(group, [1.0, 0.0, 0.0]))
    expected = torch.tensor([[1.0, 1.0], [-0.75, -0.75], [-0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)


def test_sapo_by_hand() -> None:
    """Ratio 1 is the middle of the gate: 4/tau x 1/2 x A. On-policy with A = 1 and -1: -(2 - 2/1.05) / 2."""
    group = pair(logp=[[-1.0, -1.0], [-1.0, -1.0]], advantage=[[1.0, 1.0], [-1.0, -1.0]])
    assert make("sapo").loss(batch_of(group)).value.item() == pytest.approx(-(2 - 2 / 1.05) / 2)


def test_cispo_by_hand() -> None:
    """Ratios 2 and 1 under a cap of 1.5, A = 1 and -3: weights 1.5 and 1, and no token without a gradient."""
    batch = batch_of(pair(logp=[[math.log(0.5)] * 2, [-1.0] * 2], old=[[math.log(0.25)] * 2, [-1.0] * 2],
                          advantage=[[1.0] * 2, [-3.0] * 2]))  # fmt: skip
    loss = make("cispo", ratio_cap=1.5).loss(batch)
    assert loss.value.item() == pytest.approx((1.5 * 2 * math.log(2.0) - 6.0) / 4)
    gradient_ST = torch.autograd.grad(loss.value, batch.logprobs_ST)[0]
    torch.testing.assert_close(gradient_ST, torch.tensor([[-1.5] * 2, [3.0] * 2], dtype=torch.float64) / 4)
    assert loss.metrics["capped"] == (2, 4), "a sum and a count"


def test_rloo_by_hand() -> None:
    """Rewards 1, 0, 0.5 less 0.1 times log-ratios to the reference of 2, 0, -1: 0.8, 0, 0.6 against the others' means."""
    group = random_group(random.Random(0), 3)
    for s, per_response in zip(group, (2.0, 0.0, -1.0), strict=True):
        s["ref"] = [o - per_response / len(s["old"]) for o in s["old"]]
    actual = make("rloo", kl_coef=0.1).advantages(signals_of(group, [1.0, 0.0, 0.5]))
    assert [row[0] for row in tokens(actual, group)] == pytest.approx([0.5, -0.7, 0.2])
    alone = make("rloo").advantages(signals_of(group[:1], [1.0]))
    assert not alone.any(), "there are no others to compare with"
    batch = batch_of(pair(logp=[[math.log(0.5)] * 2, [-1.0] * 2], old=[[math.log(0.25)] * 2, [-1.0] * 2],
                          advantage=[[1.0] * 2, [-3.0] * 2]))  # fmt: skip
    loss = make("rloo").loss(batch)  # ratios 2 · 2, clipped at 1.2, and 1
    assert loss.value.item() == pytest.approx((-1.2 + 3.0) / 2)
    assert loss.metrics["ratio"] == (4 + 4 + 1 + 1, 4)


def test_sft_and_vanilla_by_hand() -> None:
    group = pair(advantage=[[1.0, 1.0], [1.0, 1.0]])
    assert torch.equal(make("sft").advantages(signals_of(group, [1.0, 0.0])), torch.ones(2, 2))
    assert make("sft").loss(batch_of(group)).value.item() == pytest.approx(1.0)
    weighed = [{**group[0], "advantage": [3.0, 0.0]}, group[1]]
    expected = -sum(a * p for row in weighed for a, p in zip(row["advantage"], row["logp"], strict=True)) / 4
    assert make("sft").loss(batch_of(weighed)).value.item() == pytest.approx(expected)
    batch = batch_of(group)
    loss = make("vanilla").loss(batch).value
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, batch.logprobs_ST)[0].any()


def without_reference(signals: GroupSignals) -> GroupSignals:
    return dataclasses.replace(signals, reference_logprobs_GT=None, shares_GT=None)


def test_equal_rewards_give_no_signal() -> None:
    """Eq 20 would turn attention noise into unit variance; 'paper' keeps it."""
    group = random_group(random.Random(0), 4)
    signals = signals_of(group, [1.0] * 4)
    for name in ("e3rl", "grpo", "dr_grpo", "dapo", "gspo", "sapo", "erpo", "bapo", "disco", "cispo", "luspo", "vespo"):
        assert not make(name).advantages(signals).any(), name
    assert not make("rloo", kl_coef=0.0).advantages(signals).any()
    assert make("rloo").advantages(signals).any(), "the KL is part of the reward"
    kept = make("e3rl", degenerate_groups="paper").advantages(signals)
    assert_tokens(tokens(kept, group), reference.e3rl_advantages(group, [1.0] * 4, "causal", 1e-4))
    assert float(kept.abs().max()) > 0.9


def test_kl_is_asked_for_only_where_it_weighs() -> None:
    for name in ("e3rl", "grpo", "dr_grpo", "dapo", "gspo", "sapo", "bapo", "cispo", "rloo", "luspo", "vespo"):
        assert "reference" in make(name, kl_coef=0.1).needs
        assert "reference" not in make(name, kl_coef=0.0).needs
    assert make("e3rl", allocation="sequence", kl_coef=0.0).needs == {"rewards_only"}
    assert make("e3rl", erased="contrast").needs == {"shares", "reference", "erased"}
    assert make("e3rl", credit_weight=0.5).needs == {"shares", "reference", "uncertainties"}
    group = random_group(random.Random(1), 3)
    assert make("grpo", kl_coef=0.0).advantages(without_reference(signals_of(group, [1.0, 0.0, 0.0]))).any()


def test_the_credit_of_a_judge_is_on_the_tokens_of_its_segments_and_needs_a_judge() -> None:
    """Two siblings of two segments of two and one tokens; U 1 and 3 at the first: V is sigmoid(1) and sigmoid(-1) behind it."""
    mask_GT = torch.tensor([[True, True, True, False]] * 2)
    blank_GT = torch.zeros(2, 4, dtype=torch.float64)
    segments_GT, u_GT = torch.tensor([[0, 0, 1, -1]] * 2), torch.tensor([[1.0, 1.0, 0.5, -1.0], [3.0, 3.0, 0.5, -1.0]])
    signals = GroupSignals(
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        mask_GT,
        segments_GT,
        blank_GT,
        blank_GT,
        None,
        None,
        u_GT.double(),
    )
    objective, up = make("e3rl", allocation="value", advantage_eps=1e-12), 1 / (1 + math.exp(-1))
    first = [4 * (up - 0.5)] * 2 + [4 * (1 - up), 0.0]
    assert objective.advantages(signals).tolist() == [pytest.approx(first), pytest.approx([-a for a in first])]
    assert make("e3rl", allocation="value", kl_coef=0.0).needs == {"rewards_only", "uncertainties"}
    with pytest.raises(UserError, match=r"allocation = 'value' needs U.*rollout\.erase = true"):
        objective.advantages(dataclasses.replace(signals, uncertainties_GT=None))


def test_step_credit_adds_the_groups_mean_u_less_a_segments_own() -> None:
    """Two siblings of two and one segments: mean U by token is (0.9 + 0.9 + 0.1 + 0.5) / 4 = 0.6; the fifth was not judged."""
    segments_GT = torch.tensor([[0, 0, 1], [0, 1, -1]])
    signals = GroupSignals(
        rewards_G=torch.tensor([1.0, 1.0]),  # all alike, so that the response's own advantage is 0
        mask_GT=segments_GT >= 0,
        segments_GT=segments_GT,
        entropies_GT=torch.zeros(2, 3),
        old_logprobs_GT=torch.zeros(2, 3),
        reference_logprobs_GT=None,
        shares_GT=None,
        uncertainties_GT=torch.tensor([[0.9, 0.9, 0.1], [0.5, -1.0, -1.0]]),
    )
    objective = make("e3rl", kl_coef=0.0, allocation="sequence", credit_weight=2.0)
    expected = torch.tensor([[-0.6, -0.6, 1.0], [0.2, 0.0, 0.0]])
    torch.testing.assert_close(objective.advantages(signals), expected)
    mixed = dataclasses.replace(signals, rewards_G=torch.tensor([1.0, 0.0]))
    plain = make("e3rl", kl_coef=0.0, allocation="sequence").advantages(mixed)
    torch.testing.assert_close(objective.advantages(mixed), expected + plain)
    careful = make("e3rl", kl_coef=0.0, allocation="sequence", credit_weight=2.0, credit_groups="mixed")
    torch.testing.assert_close(
        careful.advantages(signals), torch.zeros(2, 3)
    )  # rewards that are all alike tell it nothing
    torch.testing.assert_close(careful.advantages(mixed), expected + plain)
    with pytest.raises(UserError, match=r"credit_weight needs U.*rollout\.erase = true"):
        objective.advantages(dataclasses.replace(signals, uncertainties_GT=None))
