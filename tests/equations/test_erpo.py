"""ERPO's equations: numbers worked by hand, and the properties that the paper states."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e3rl.equations import erpo
from e3rl.equations.policy import k3_kl
from e3rl.objectives.base import Totals, TrainBatch
from e3rl.train.step_metrics import reward_metrics
from e3rl.types import Group, Problem, Prompt, Reward, RewardedGroup
from tests.objectives.support import make
from tests.train.rollouts import trajectory

EPS = 1e-12


def close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64))


def test_expected_reward() -> None:
    """ERPO eq 2. Its estimate is the mean reward that is logged."""
    prompt = Prompt(Problem("p", "p"), (2,))
    siblings = tuple(trajectory(prompt, i, [3], [], Random(i)) for i in range(3))
    rewards = tuple(Reward(value, {"first": value}) for value in (1.0, 0.0, 0.5))
    assert reward_metrics([RewardedGroup(Group(prompt, siblings, 0), rewards)])["reward"] == 0.5


def test_group_advantages() -> None:
    """ERPO eq 3. Rewards 1, 0, 0, 0: mean 1/4, sample variance (9/16 + 3/16)/3 = 1/4."""
    close(erpo.group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), EPS), [1.5, -0.5, -0.5, -0.5])
    close(erpo.group_advantages(torch.tensor([0.3] * 7), EPS), [0.0] * 7)
    close(erpo.group_advantages(torch.tensor([0.3]), EPS), [0.0])


def test_kl_estimate() -> None:
    """ERPO eq 4. Twice as likely under the reference: 2 - ln 2 - 1."""
    assert k3_kl(torch.tensor(0.25).log(), torch.tensor(0.5).log()).item() == pytest.approx(0.306853, abs=1e-6)


def test_grpo_objective() -> None:
    """ERPO eq 5. Ratio 2 held at 1.2, ratio 1 with A = -1, three tokens: -(1.2 - 1 - 1)/3, plus KL 0.1 x 0.5/3.

    The reference agrees with the old policy; k3 of ratio 2 is 1/2 + ln 2 - 1.
    """
    old_GT, half = torch.full((2, 2), -1.0).double(), torch.tensor(2.0).double().log().item()
    logprobs_GT = old_GT + torch.tensor([[half, 0.0], [0.0, 0.0]])
    advantages_GT = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    batch = TrainBatch(
        logprobs_ST=logprobs_GT.requires_grad_(),
        old_logprobs_ST=old_GT,
        reference_logprobs_ST=old_GT,
        advantages_ST=advantages_GT,
        mask_ST=torch.tensor([[True, False], [True, True]]),
        segments_ST=torch.tensor([[0, -1], [0, 0]]),
        group_sizes_S=torch.tensor([2, 2]),
        erased_S=torch.tensor([False, False]),
        totals=Totals(groups=1, sequences=2, tokens=3, completion_limit=2),
    )
    loss = make("grpo", kl_coef=0.1).loss(batch).value
    assert loss.item() == pytest.approx(0.8 / 3 + 0.1 * (half - 0.5) / 3)


def test_progress_signal() -> None:
    """ERPO eq 7. beta (log pi - log pi_ref)."""
    close(erpo.progress_signal(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), 2.0), [1.0, -2.0])


def test_entropy_gate() -> None:
    """ERPO eq 8. Entropies 0, 0, 2, 2: z = +-1; sigmoid(2) = 0.880797 and sigmoid(-2) = 0.119203. Padding stays out."""
    entropies_GT = torch.tensor([[0.0, 2.0, 99.0], [2.0, 0.0, 99.0]]).double()
    mask_GT = torch.tensor([[True, True, False]] * 2)
    expected = [[0.1192029220, 0.8807970780, 0.0], [0.8807970780, 0.1192029220, 0.0]]
    close(erpo.entropy_gate(entropies_GT, mask_GT, 2.0, EPS), expected)


def test_equal_entropies_gate_at_one_half() -> None:
    """ERPO eq 8."""
    mask_GT = torch.ones(2, 3, dtype=torch.bool)
    close(erpo.entropy_gate(torch.full((2, 3), 0.7), mask_GT, 5.0, 1e-4), [[0.5] * 3] * 2)


def test_progress_buckets() -> None:
    """ERPO eq 9. Five tokens in K = 2: tau = 0, .2, .4, .6, .8; two tokens: 0, .5; one: 0."""
    mask_GT = torch.arange(5) < torch.tensor([[5], [2], [1]])
    expected = [[0, 0, 0, 1, 1], [0, 1, -1, -1, -1], [0, -1, -1, -1, -1]]
    assert erpo.progress_buckets(mask_GT, 2).tolist() == expected


@given(length=st.integers(1, 60), buckets=st.integers(1, 20))
def test_buckets_are_in_order_and_in_range(length: int, buckets: int) -> None:
    """ERPO eq 9."""
    row = erpo.progress_buckets(torch.ones(1, length, dtype=torch.bool), buckets)[0].tolist()
    assert row == sorted(row)
    assert row[0] == 0
    assert row[-1] < buckets


def test_bucket_normalized() -> None:
    """ERPO eq 9. Bucket 0 holds 1, 3, 5 (mean 3, std sqrt(8/3)), bucket 1 holds 7 alone, which is its own mean."""
    signal_GT = torch.tensor([[1.0, 3.0, 7.0], [5.0, 9.0, 9.0]]).double()
    buckets_GT = torch.tensor([[0, 0, 1], [0, -1, -1]])
    spread = 1.224744871391589
    close(erpo.bucket_normalized(signal_GT, buckets_GT, 2, EPS), [[-spread, 0.0, 0.0], [spread, 0.0, 0.0]])


def test_calibrated_progress() -> None:
    """ERPO eq 10. W sgn(A) s~ = 1, -1, -2, 2 over the active tokens: std sqrt(2.5), rescaled to 0.5.

    The third sibling has no advantage: it is not active and gets nothing.
    """
    gate_GT, mask_GT = torch.ones(3, 2).double(), torch.ones(3, 2, dtype=torch.bool)
    signal_GT = torch.tensor([[1.0, -1.0], [2.0, -2.0], [50.0, 50.0]]).double()
    psi_GT = erpo.calibrated_progress(gate_GT, torch.tensor([0.8, -0.8, 0.0]), signal_GT, mask_GT, 0.5, EPS)
    unit = 0.5 / 2.5**0.5
    close(psi_GT, [[unit, -unit], [-2 * unit, 2 * unit], [0.0, 0.0]])


def test_progress_of_a_wrong_answer_counts_against_it() -> None:
    """ERPO eq 10. Outcome anchoring: the same confident token is raised in a right answer, lowered in a wrong one."""
    mask_GT = torch.ones(2, 2, dtype=torch.bool)
    signal_GT = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    psi_GT = erpo.calibrated_progress(torch.ones(2, 2), torch.tensor([1.0, -1.0]), signal_GT, mask_GT, 1.0, EPS)
    assert psi_GT[0, 0] > 0 > psi_GT[1, 0]


def test_synthesized_advantages() -> None:
    """ERPO eq 10. A + eta Psi = 3, 1, -1, -3 with eta 1/2: mean 0, std sqrt(5)."""
    psi_GT = torch.tensor([[2.0, -2.0], [2.0, -2.0]]).double()
    mask_GT = torch.ones(2, 2, dtype=torch.bool)
    final_GT = erpo.synthesized_advantages(torch.tensor([2.0, -2.0]).double(), psi_GT, mask_GT, 0.5, EPS)
    close(final_GT, [[3 / 5**0.5, 1 / 5**0.5], [-1 / 5**0.5, -3 / 5**0.5]])


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_the_added_gradient_is_that_of_a_potential(seed: int) -> None:
    """ERPO eq 11-15. sum Lambda s grad log pi, through the logits of a softmax policy, is beta grad of the potential.

    Lambda and s are constants of the gradient step; s is eq 7's raw signal, as in the paper's proof.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids_T = torch.randint(5, (6, 1), generator=generator)
    reference_T = -torch.rand(6, generator=generator, dtype=torch.float64)
    weights_T = torch.randn(6, generator=generator, dtype=torch.float64)
    logprobs_T, beta = logits_TV.log_softmax(-1).gather(-1, ids_T).squeeze(-1), 0.3
    signal_T = erpo.progress_signal(logprobs_T, reference_T, beta).detach()
    added = torch.autograd.grad((weights_T * signal_T * logprobs_T).sum(), logits_TV, retain_graph=True)
    potential = beta * 0.5 * (weights_T * (logprobs_T - reference_T).square()).sum()  # eq 15 without its second eta
    torch.testing.assert_close(added, torch.autograd.grad(potential, logits_TV))


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), siblings=st.integers(2, 8), width=st.integers(1, 20))
def test_final_advantages_are_zero_sum_with_unit_variance(seed: int, siblings: int, width: int) -> None:
    """ERPO eq 16. Over all tokens of the group, whatever the lengths, entropies and signals."""
    generator = torch.Generator().manual_seed(seed)
    mask_GT = torch.arange(width) < torch.randint(1, width + 1, (siblings, 1), generator=generator)
    advantages_G = erpo.group_advantages(torch.rand(siblings, generator=generator, dtype=torch.float64), EPS)
    psi_GT = torch.randn(siblings, width, generator=generator, dtype=torch.float64).where(mask_GT, 0.0)
    final_GT = erpo.synthesized_advantages(advantages_G, psi_GT, mask_GT, 0.3, EPS)
    assert final_GT[mask_GT].sum().item() == pytest.approx(0.0, abs=1e-9)
    assert final_GT[mask_GT].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert not final_GT[~mask_GT].any()


def test_inflating_entropy_only_moves_advantage_around() -> None:
    """ERPO eq 16. A token that gains by a larger gate takes it from the others: the sum stays 0."""
    mask_GT, advantages_G = torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, -1.0]).double()
    signal_GT = torch.tensor([[1.0, 0.2, -0.4], [0.3, -0.9, 0.1]]).double()
    finals = []
    for entropy in (0.5, 5.0):
        entropies_GT = torch.tensor([[entropy, 0.4, 0.3], [0.2, 0.6, 0.5]]).double()
        gate_GT = erpo.entropy_gate(entropies_GT, mask_GT, 1.0, EPS)
        psi_GT = erpo.calibrated_progress(gate_GT, advantages_G, signal_GT, mask_GT, 1.0, EPS)
        finals.append(erpo.synthesized_advantages(advantages_G, psi_GT, mask_GT, 0.5, EPS))
    assert finals[1][0, 0] > finals[0][0, 0]
    assert (finals[1] - finals[0]).sum().item() == pytest.approx(0.0, abs=1e-9)
