"""Eq 2-5, 7, 10: one token, where it is drawn and where it is learnt from."""

from __future__ import annotations

from math import inf, isnan, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.equations import tokens
from e3rl.train.packing import TrainSequence
from e3rl.train.scoring import score_sequences
from tests.engine.models import build
from tests.equations import reference
from tests.equations.support import close, distributions, f64, logits, matrix


def test_token_distribution_divides_by_the_temperature() -> None:
    """Eq 2-3. Logits 0 and 2 ln 3: at temperature 2 p = (1/4, 3/4), at temperature 1 p = (1/10, 9/10)."""
    rows = f64([[0.0, 2 * log(3)]] * 2)
    close(tokens.token_distribution(rows, f64([[2.0], [1.0]])), [[log(0.25), log(0.75)], [log(0.1), log(0.9)]])
    close(tokens.token_distribution(rows[:1], 2.0), [[log(0.25), log(0.75)]])


@given(matrix(1, 3, st.floats(-4, 4)), matrix(5, 3, st.floats(-4, 4)), st.floats(0.1, 4))
def test_token_distribution_agrees_with_the_reference(
    hidden: list[list[float]], embeddings: list[list[float]], temperature: float
) -> None:
    """Eq 2-3. From a hidden state and the output matrix, against plain Python; probabilities add up to 1."""
    probabilities = tokens.token_distribution(f64(hidden[0]) @ f64(embeddings).T, temperature).exp()
    close(probabilities, reference.token_distribution(hidden[0], embeddings, temperature))
    close(probabilities.sum(), 1.0)


def test_perturbation_is_the_gap_to_the_likeliest() -> None:
    """Eq 4-5. p = (1/2, 1/4, 1/4): the likeliest has log 1/2, so 0 for it and ln 2 for another."""
    rows = f64([[0.5, 0.25, 0.25]] * 2).log()
    greedy = tokens.greedy_logprob(rows)
    close(greedy, [[log(0.5)]] * 2)
    close(tokens.perturbation(greedy, rows.gather(1, torch.tensor([[0], [2]]))), [0.0, log(2)])


@given(distributions(), st.integers(0, 11))
def test_perturbation_agrees_with_the_reference(row: list[float], pick: int) -> None:
    """Eq 4-5. Never negative, 0 for the greedy token."""
    sampled = pick % len(row)
    logprobs = tokens.token_distribution(f64([row]), 1.0)
    greedy = tokens.greedy_logprob(logprobs)
    found = tokens.perturbation(greedy, logprobs[:, sampled, None])
    close(found, [reference.perturbation(row, sampled)])
    assert found >= 0
    assert tokens.perturbation(greedy, logprobs[:, logprobs.argmax(), None]) == 0


def test_a_token_changes_later_distributions_alone() -> None:
    """Eq 7. With the third response token changed, the first three were as likely as before, the later ones are not."""
    model = build("Llama")

    def logprobs(response: tuple[int, ...]) -> torch.Tensor:
        zeros = torch.zeros(len(response))
        sequence = TrainSequence((5, 6), response, zeros.long(), zeros == 0, zeros, 0, 0, False)
        return score_sequences(model, [sequence], temperature=1.0, token_budget=64)[0].logprobs_T

    before, after = logprobs((7, 8, 9, 10, 11)), logprobs((7, 8, 12, 10, 11))
    torch.testing.assert_close(before[:2], after[:2])
    assert ((before[3:] - after[3:]).abs() > 1e-4).all()


def entropy(row: torch.Tensor) -> torch.Tensor:
    logprobs = tokens.token_distribution(row, 1.0)
    return tokens.token_entropy(logprobs.exp(), logprobs)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0] * 4, log(4)),  # uniform
        ([1000.0, 1000.0], log(2)),  # large logits do not overflow
        ([log(2), 0.0, 0.0], 1.5 * log(2)),  # p = 1/2, 1/4, 1/4: 1/2 ln 2 + 2 * 1/4 ln 4
        ([7.0], 0.0),  # a vocabulary of one
    ],
)
def test_token_entropy(row: list[float], expected: float) -> None:
    """Eq 10; ERPO eq 6. In nats, whichever of the three ways it is computed."""
    close(entropy(f64(row)), expected)
    close(rescaled(row, 1.0), expected)
    close(tokens.token_scores(f64([row]), torch.tensor([0]), 1.0)[1], [expected])


@pytest.mark.parametrize("bad", [inf, -inf, float("nan")])
def test_a_logit_that_is_not_finite_gives_no_entropy(bad: float) -> None:
    """Eq 10. The row can be told by its NaN: nothing is drawn from it."""
    assert isnan(entropy(f64([0.0, bad, 1.0])).item())


@given(distributions(), st.floats(-50, 50))
def test_token_entropy_agrees_with_the_reference(row: list[float], shift: float) -> None:
    """Eq 10. Against plain Python; within [0, log V]; the same for shifted and for reordered logits."""
    found = entropy(f64(row))
    close(found, reference.token_entropy(row))
    assert -1e-12 <= found <= log(len(row)) + 1e-12
    close(entropy(f64(row[::-1]) + shift), float(found))


def test_truncated_entropy() -> None:
    """Eq 10. Of 1/2, 1/4, 1/4 the last is dropped: 2/3 and 1/3 are left."""
    logprobs = f64([[0.5, 0.25, 0.25]]).log()
    kept, mass = f64([[0.5, 0.25, 0.0]]), f64([0.75])
    close(tokens.truncated_entropy(kept, logprobs, mass), [log(3) - 2 / 3 * log(2)])


def rescaled(row: list[float], ratio: float) -> torch.Tensor:
    logprobs = tokens.token_distribution(f64([row]), 1.0)
    scratch = torch.empty_like(logprobs)
    return tokens.rescaled_entropy(logprobs, tokens.greedy_logprob(logprobs), f64([[ratio]]), scratch)[0]


@given(distributions(), st.floats(0.2, 3))
def test_rescaled_entropy_agrees_with_the_reference(row: list[float], ratio: float) -> None:
    """Eq 2, 10. The entropy of the logits times the ratio, whatever the distribution was normalised with."""
    close(rescaled(row, ratio), reference.token_entropy([ratio * x for x in row]), tolerance=1e-7)


@given(matrix(3, 5, logits), st.lists(st.integers(0, 4), min_size=3, max_size=3), st.floats(0.3, 3))
def test_token_scores_agree_with_the_reference(rows: list[list[float]], ids: list[int], temperature: float) -> None:
    """Eq 1-2, 10. Log-probabilities and entropies of several tokens at once."""
    logprobs, entropies, _ = tokens.token_scores(f64(rows), torch.tensor(ids), temperature)
    scaled = [[x / temperature for x in row] for row in rows]
    shifted = [[x - max(row) for x in row] for row in scaled]
    totals = [reference.log_total(row) for row in shifted]
    close(logprobs, [row[i] - z for row, i, z in zip(shifted, ids, totals, strict=True)], tolerance=1e-7)
    close(entropies, [reference.token_entropy(row) for row in scaled], tolerance=1e-7)


def test_logprob_gradient_is_numerically_right() -> None:
    """Eq 1-2. Against finite differences of the log-probabilities themselves."""
    rows, ids, weights = f64([[0.3, -1.0, 2.0], [1.0, 0.0, -0.5]]), torch.tensor([2, 0]), f64([1.0, -3.0])
    _, _, log_z = tokens.token_scores(rows.clone(), ids, 0.7)
    found = tokens.logprob_gradient(rows.clone(), log_z, ids, weights, 0.7)
    step, expected = 1e-6, torch.empty_like(rows)
    for s, v in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        sides = []
        for sign in (1, -1):
            moved = rows.clone()
            moved[s, v] += sign * step
            sides.append((tokens.token_scores(moved, ids, 0.7)[0] * weights).sum())
        expected[s, v] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
