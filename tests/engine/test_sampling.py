"""Sampling by value: hand-worked distributions, a plain-Python reference, frequencies, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import NON_FINITE, SamplingRows, check_sampling, inverse_cdf, sample
from e3rl.errors import UserError

HALVES = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def run(logits: torch.Tensor, samplings: list[Sampling], numbers: list[float]):
    return sample(logits, SamplingRows.of(samplings, "cpu"), torch.tensor(numbers, dtype=torch.float64))


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.88, 3), (1 - 2**-53, 3)]
)
def test_uniform_picks_the_token_under_it_in_vocabulary_order(number, token):
    samples = run(HALVES[None], [Sampling()], [number])
    assert samples.ids_S.tolist() == [token]


def test_measures_of_a_hand_worked_distribution():
    # p = 1/2, 1/4, 1/8, 1/8: H = 1.75 bits; token 2 has log p = -3 bits, two bits below the likeliest
    [measures] = run(HALVES[None], [Sampling()], [0.8]).measures()
    bits = math.log(2)
    assert measures == pytest.approx((-3 * bits, 1.75 * bits, 2 * bits, 1.0, 3), abs=1e-6)


def test_temperature_scales_before_everything_else():
    # at temperature 0.5 the probabilities are squared: 16, 4, 1, 1 of 22
    [measures] = run(HALVES[None], [Sampling(temperature=0.5)], [0.9]).measures()
    p = [16 / 22, 4 / 22, 1 / 22, 1 / 22]
    entropy = -sum(x * math.log(x) for x in p)
    assert measures == pytest.approx((math.log(4 / 22), entropy, math.log(4), 1.0, 2), abs=1e-6)


def test_entropy_and_perturbation_can_be_those_of_another_temperature():
    # drawn at 0.5 from 16, 4, 1, 1 of 22, measured at 1: 1.75 bits, token 1 one bit below the likeliest
    [measures] = run(HALVES[None], [Sampling(temperature=0.5, measured_at=1.0)], [0.9]).measures()
    assert measures == pytest.approx((math.log(4 / 22), 1.75 * math.log(2), math.log(2), 1.0, 2), abs=1e-6)
    [own] = run(HALVES[None], [Sampling(temperature=0.5, measured_at=0.5)], [0.9]).measures()
    [neighbour, _] = run(HALVES.repeat(2, 1), [Sampling(0.5), Sampling(0.5, measured_at=2.0)], [0.9, 0.9]).measures()
    [alone] = run(HALVES[None], [Sampling(0.5)], [0.9]).measures()
    assert own.tolist() == neighbour.tolist() == alone.tolist()


def test_top_k_keeps_the_likeliest_and_measures_the_whole():
    sampling = Sampling(top_k=2)
    samples = run(HALVES.expand(3, 4), [sampling] * 3, [0.66, 0.67, 1 - 2**-53])
    assert samples.ids_S.tolist() == [0, 1, 1]  # 2/3 and 1/3 of what is left
    [first, *_] = samples.measures()
    assert first == pytest.approx((math.log(0.5), 1.75 * math.log(2), 0.0, 0.75, 1), abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    kept = [run(HALVES[None], [Sampling(top_p=p)], [0.0]).kept_mass_S.item() for p in (0.1, 0.5, 0.51, 0.75)]
    assert kept == pytest.approx([0.5, 0.5, 0.75, 0.75], abs=1e-6)


def test_top_p_is_taken_of_what_top_k_left():
    # top-k leaves 0.5 and 0.25: two thirds of it is the first token alone
    samples = run(HALVES[None], [Sampling(top_k=2, top_p=0.6)], [0.99])
    assert samples.ids_S.item() == 0
    assert samples.kept_mass_S.item() == pytest.approx(0.5, abs=1e-6)


def test_equally_likely_tokens_are_kept_together():
    samples = run(HALVES[None], [Sampling(top_k=3)], [0.99])
    assert samples.kept_mass_S.item() == pytest.approx(1.0)
    assert samples.ids_S.item() == 3


def test_kept_mass_never_exceeds_one_by_rounding():
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(6))
    assert (logits.softmax(-1).sum(-1) > 1).any()
    kept = run(logits, [Sampling(top_k=3000)] * 200, [0.5] * 200).kept_mass_S
    assert kept.max().item() == 1.0
    assert kept.min().item() == pytest.approx(1.0, abs=1e-5)


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    # 1/2, 1/4, 1/8, 1/8: a share of 0.4 keeps the first two, 0.25 all (equals the bound), 0.26 two, 1 the likeliest
    shares = [0.4, 0.25, 0.26, 1.0]
    samples = run(HALVES.expand(4, 4), [Sampling(min_p=s) for s in shares], [1 - 2**-53] * 4)
    assert samples.ids_S.tolist() == [1, 3, 1, 0]
    assert samples.kept_mass_S.tolist() == pytest.approx([0.75, 1.0, 0.75, 0.5])
    assert samples.entropies_S.tolist() == pytest.approx([1.75 * math.log(2)] * 4)


def test_min_p_comes_after_the_temperature_and_before_top_p():
    # at 0.5: 16, 4, 1, 1; a share of 0.2 keeps 16 and 4, of which top-p 0.8 keeps the first alone (16 >= 0.8 * 20)
    chosen = Sampling(temperature=0.5, min_p=0.2, top_p=0.8)
    assert run(HALVES[None], [chosen], [1 - 2**-53]).kept_mass_S.tolist() == pytest.approx([16 / 22])
    # top-k beside it: the narrower of the two holds
    both = [Sampling(min_p=0.4, top_k=3), Sampling(min_p=0.1, top_k=1), Sampling(min_p=0.4), Sampling()]
    samples = run(HALVES.expand(4, 4), both, [1 - 2**-53] * 4)
    assert samples.ids_S.tolist() == [1, 0, 1, 3]
    assert samples.kept_mass_S.tolist() == pytest.approx([0.75, 0.5, 0.75, 1.0])


def test_truncated_entropy_is_that_of_the_renormalised_rest():
    rows = [
        Sampling(top_k=2, entropy_distribution="truncated"),
        Sampling(top_k=2),
        Sampling(entropy_distribution="truncated"),
    ]
    entropies = run(HALVES.expand(3, 4), rows, [0.1] * 3).entropies_S.tolist()
    truncated = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert entropies == pytest.approx([truncated, 1.75 * math.log(2), 1.75 * math.log(2)], abs=1e-6)


def test_top_k_of_one_is_greedy_with_no_entropy_left():
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    numbers = torch.rand(20, generator=torch.Generator().manual_seed(2)).tolist()
    samples = run(logits, [Sampling(top_k=1, entropy_distribution="truncated")] * 20, numbers)
    assert samples.ids_S.tolist() == logits.argmax(-1).tolist()
    assert samples.entropies_S.tolist() == pytest.approx([0.0] * 20, abs=1e-6)
    assert samples.perturbations_S.tolist() == [0.0] * 20


def test_frequencies_are_those_of_the_truncated_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(700, generator=generator) * 2  # more than one block of the search
    draws = 40_000
    numbers = torch.rand(draws, dtype=torch.float64, generator=generator)
    counts = np.zeros(700, dtype=int)
    many = SamplingRows.of([Sampling(temperature=1.3, top_k=60, top_p=0.9)] * 1000, "cpu")
    for start in range(0, draws, 1000):
        ids = sample(logits.expand(1000, 700), many, numbers[start : start + 1000]).ids_S
        counts += np.bincount(ids.numpy(), minlength=700)
    expected = reference_distribution(logits.tolist(), 1.3, 60, 0.9)
    assert all(counts[i] == 0 for i, p in enumerate(expected) if p == 0)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected) if p > 0)
    freedom = sum(p > 0 for p in expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def reference_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The truncated, renormalised distribution, step by step in plain Python; no two logits may be equal."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    p = [w / sum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: top_k or len(p)]
    mass = sum(p[i] for i in kept)
    if top_p < 1:
        nucleus: list[int] = []
        while sum(p[i] for i in nucleus) < top_p * mass:
            nucleus.append(kept[len(nucleus)])
        kept = nucleus
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


@st.composite
def cases(draw):
    """Rows of distinct logits with settings whose nucleus does not end within rounding of a token's boundary."""
    size = draw(st.integers(1, 30))
    order = draw(st.permutations(range(size)))
    step = draw(st.sampled_from([0.1, 0.37, 1.1]))
    return (
        [step * i for i in order],
        draw(st.sampled_from([0.5, 1.0, 1.7])),
        draw(st.integers(0, size)),
        draw(st.sampled_from([0.137, 0.519, 0.873, 1.0])),
        draw(st.sampled_from([0.0, 0.6, 1.0])),
        draw(st.floats(0, 1, exclude_max=True)),
    )


@settings(max_examples=150)
@given(st.lists(cases(), min_size=1, max_size=4))
def test_every_row_follows_the_plain_reference(rows):
    width = max(len(row[0]) for row in rows)
    logits = torch.tensor([row[0] + [-60.0 - i for i in range(width - len(row[0]))] for row in rows])
    samplings = [Sampling(t, p, k, measured_at=m) for _, t, k, p, m, _ in rows]
    samples = run(logits, samplings, [row[5] for row in rows])
    for i, (_, temperature, top_k, top_p, measured_at, number) in enumerate(rows):
        measured = reference_distribution(logits[i].tolist(), measured_at or temperature, 0, 1.0)
        full = reference_distribution(logits[i].tolist(), temperature, 0, 1.0)
        kept = reference_distribution(logits[i].tolist(), temperature, top_k, top_p)
        token = samples.ids_S[i].item()
        before = sum(kept[:token])
        assert kept[token] > 0
        assert before - 1e-5 <= number <= before + kept[token] + 1e-5
        assert samples.logprobs_S[i].item() == pytest.approx(math.log(full[token]), abs=1e-4)
        entropy = -sum(p * math.log(p) for p in measured if p > 0)
        assert samples.entropies_S[i].item() == pytest.approx(entropy, abs=1e-5)
        assert samples.perturbations_S[i].item() == pytest.approx(math.log(max(measured) / measured[token]), abs=1e-4)
        likelier = [sum(p > full[token] * (1 + slack) for p in full) for slack in (-1e-4, 1e-4)]
        assert likelier[1] <= samples.ranks_S[i].item() - 1 <= likelier[0]
        mass = sum(p for p, k in zip(full, kept, strict=True) if k > 0)
        assert samples.kept_mass_S[i].item() == pytest.approx(mass, abs=1e-5)


@settings(max_examples=100)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1.0)), min_size=1, max_size=1200).filter(any),
    st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53)),
)
def test_a_token_without_weight_is_never_drawn(weights, number):
    weights_SV = torch.tensor([weights])
    token = inverse_cdf(weights_SV, torch.tensor([number], dtype=torch.float64)).item()
    assert weights_SV[0, token] > 0


def test_search_across_blocks_agrees_with_numpy():
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(6, 1537, generator=generator)
    numbers = torch.rand(6, dtype=torch.float64, generator=generator)
    running = weights.double().cumsum(-1).numpy()
    expected = [
        np.searchsorted(row, u * row[-1], side="right") for row, u in zip(running, numbers.numpy(), strict=True)
    ]
    assert inverse_cdf(weights, numbers).tolist() == expected


def test_rows_worked_on_in_parts_come_out_as_all_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(10, 1000, generator=generator)
    numbers = torch.rand(10, generator=generator).tolist()
    settings = [Sampling(temperature=0.5 + i / 10, top_k=5 * i, top_p=1 - i / 20) for i in range(10)]
    whole = run(logits, settings, numbers)
    monkeypatch.setattr("e3rl.engine.sampling._CPU_ENTRIES", 4 * 1000)
    parts = run(logits, settings, numbers)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3, top_p=0.9)])
def test_a_non_finite_row_gets_no_token_and_spoils_no_other(poison, sampling):
    logits = HALVES.repeat(3, 1)
    logits[1, 2] = poison
    healthy = run(HALVES.repeat(2, 1), [sampling] * 2, [0.3, 0.7])
    samples = run(logits, [sampling] * 3, [0.3, 0.5, 0.7])
    assert samples.ids_S.tolist() == [healthy.ids_S[0].item(), NON_FINITE, healthy.ids_S[1].item()]
    assert samples.entropies_S[[0, 2]].tolist() == healthy.entropies_S.tolist()


def test_a_row_is_the_same_beside_other_settings():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5))
    rows = [Sampling(), Sampling(0.7, top_k=4), Sampling(top_p=0.6, entropy_distribution="truncated")]
    numbers = [0.2, 0.5, 0.9]
    together = run(logits, rows, numbers)
    for i, row in enumerate(rows):
        alone = run(logits[i : i + 1], [row], numbers[i : i + 1])
        assert alone.ids_S.item() == together.ids_S[i].item()
        assert alone.measures()[0] == pytest.approx(together.measures()[i], abs=1e-6)


def test_half_precision_logits_are_measured_in_single_precision():
    logits = (torch.randn(2, 5000, generator=torch.Generator().manual_seed(4)) * 3).bfloat16()
    low = run(logits, [Sampling()] * 2, [0.4, 0.6])
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert low.entropies_S.dtype == torch.float32
    assert low.entropies_S.tolist() == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=0.0), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(entropy_distribution="half"), "entropy_distribution"),
        (Sampling(measured_at=-0.1), "measured_at"),
        (Sampling(measured_at=math.nan), "measured_at"),
        (Sampling(measured_at=1.0, entropy_distribution="truncated"), "measured_at must be 0"),
    ],
)
def test_settings_out_of_range_are_named(sampling, name):
    with pytest.raises(UserError, match=name):
        check_sampling(sampling)
