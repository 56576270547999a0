"""The contract suite: every objective of the package keeps it, and it finds what breaks it."""

from __future__ import annotations

import dataclasses
import random
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e3rl.errors import UserError
from e3rl.objectives import OBJECTIVES
from e3rl.objectives.base import GroupSignals, Loss, Need, Totals, TrainBatch, TrajectoriesOnly
from e3rl.objectives.checks import toy_signals
from e3rl.testing.objective import check_objective, rows
from tests.objectives.support import batch_of, make, random_group

EXAMPLE = Path(__file__).parents[2] / "examples" / "objective_reinforce.py"
ADDITIVE = sorted(set(OBJECTIVES) - {"bapo"})
VARIANTS = [
    {"allocation": "anchored", "ratio": "segment_mean"},
    {"allocation": "sequence", "kl_coef": 0.0},
    {"allocation": "value", "kl_coef": 0.0},
    {"allocation": "sequence", "credit_weight": 0.5},
    {"erased": "contrast", "attribution_layers": "all"},
    {"degenerate_groups": "paper"},
]


@pytest.mark.parametrize("name", ADDITIVE)
def test_objectives_keep_the_contract(name: str) -> None:
    check_objective(make(name))


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_of_e3rl_keep_the_contract(options: dict) -> None:
    check_objective(make("e3rl", **options))


@pytest.mark.parametrize(
    "name", ["e3rl", "grpo", "dr_grpo", "dapo", "gspo", "sapo", "erpo", "bapo", "rloo", "luspo", "vespo"]
)
def test_a_ratio_beyond_all_numbers_is_clipped_like_any_other(name: str) -> None:
    """e^200 is infinite in float32, and the zero gradient of a clipped term would come out as 0 * inf."""
    old_ST = torch.full((2, 3), -201.0)
    logprobs_ST = (old_ST + 200.0).requires_grad_()
    batch = TrainBatch(
        logprobs_ST=logprobs_ST,
        old_logprobs_ST=old_ST,
        reference_logprobs_ST=old_ST + 200.0,
        advantages_ST=torch.ones(2, 3),
        mask_ST=torch.ones(2, 3, dtype=torch.bool),
        segments_ST=torch.tensor([[0, 0, 1]] * 2),
        group_sizes_S=torch.tensor([2, 2]),
        erased_S=torch.tensor([False, False]),
        totals=Totals(groups=1, sequences=2, tokens=6, completion_limit=3),
    )
    loss = make(name).loss(batch).value
    (gradient_ST,) = torch.autograd.grad(loss, logprobs_ST)
    assert loss.isfinite()
    assert gradient_ST.tolist() == [[0.0] * 3] * 2


def test_bapo_keeps_all_but_additivity() -> None:
    check_objective(make("bapo"), additive=False)


@pytest.mark.parametrize("name", ADDITIVE)
@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_gradients_do_not_depend_on_micro_batches(name: str, seed: int, cuts: list[int]) -> None:
    """Groups of 5 and 3 siblings, dealt out to up to four micro-batches in any way."""
    rng = random.Random(seed)
    batch, objective = batch_of(random_group(rng, 5) + random_group(rng, 3), groups=2), make(name)

    def loss_and_gradient(part: TrainBatch) -> tuple[Tensor, Tensor]:
        logprobs_ST = part.logprobs_ST.detach().requires_grad_()
        value = objective.loss(dataclasses.replace(part, logprobs_ST=logprobs_ST)).value
        return value.detach(), torch.autograd.grad(value, logprobs_ST)[0]

    value, gradient_ST = loss_and_gradient(batch)
    total, together_ST = torch.zeros_like(value), torch.zeros_like(gradient_ST)
    for part in range(4):
        chosen = [row for row, cut in enumerate(cuts) if cut == part]
        if chosen:
            piece, piece_ST = loss_and_gradient(rows(batch, chosen))
            total, together_ST[chosen] = total + piece, piece_ST
    torch.testing.assert_close(total, value, atol=1e-9, rtol=0)
    torch.testing.assert_close(together_ST, gradient_ST, atol=1e-9, rtol=0)


def test_bapo_bounds_depend_on_the_micro_batch() -> None:
    """Why BAPO is the exception: alone, a rising sequence needs no wider bounds; beside a falling one it does."""
    group = random_group(random.Random(0), 2)
    group[0]["advantage"], group[1]["advantage"] = [1.0] * len(group[0]["old"]), [-9.0] * len(group[1]["old"])
    batch, objective = batch_of(group), make("bapo")
    assert objective.loss(rows(batch, [0])).metrics["bound_high"][0] == 1.2
    assert objective.loss(batch).metrics["bound_high"][0] == pytest.approx(3.0)


def test_the_example_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "keeps the contract" in capsys.readouterr().out


def test_the_example_is_built_from_its_file() -> None:
    objective = make(f"{EXAMPLE}:Reinforce", entropy_weight=0.5)
    signals = toy_signals(frozenset())  # rewards 1, 0 and 1/2
    plain = make(f"{EXAMPLE}:Reinforce").advantages(signals)
    assert plain[:, 0].tolist() == [0.75, -0.75, 0.0]
    bonus = objective.advantages(signals) - plain
    torch.testing.assert_close(bonus, -0.5 * signals.old_logprobs_GT.double())


@dataclass(frozen=True)
class Good(TrajectoriesOnly):
    """-A log pi over tokens: the smallest objective that keeps the contract."""

    needs = frozenset[Need]()

    def advantages(self, signals: GroupSignals) -> Tensor:
        return (signals.rewards_G - signals.rewards_G.mean())[:, None] * signals.mask_GT

    def loss(self, batch: TrainBatch) -> Loss:
        logprobs_ST = batch.logprobs_ST.where(batch.mask_ST, 0.0)
        return Loss(-(batch.advantages_ST * logprobs_ST).sum() / batch.totals.tokens, {})


def test_the_smallest_objective_keeps_the_contract() -> None:
    check_objective(Good())


@dataclass(frozen=True)
class OwnMean(Good):
    def loss(self, batch: TrainBatch) -> Loss:
        return Loss(super().loss(batch).value / len(batch.mask_ST), {})


@dataclass(frozen=True)
class Unmasked(Good):
    def loss(self, batch: TrainBatch) -> Loss:
        return Loss(-batch.logprobs_ST.sum() / batch.totals.tokens, {})


@dataclass(frozen=True)
class Peeking(Good):
    def advantages(self, signals: GroupSignals) -> Tensor:
        return (signals.entropies_GT - signals.entropies_GT.mean()).where(signals.mask_GT, 0.0)


@dataclass(frozen=True)
class NotOnlyRewards(Good):
    needs = frozenset({"rewards_only"})

    def advantages(self, signals: GroupSignals) -> Tensor:
        return super().advantages(signals) * (1 + signals.entropies_GT)


@dataclass(frozen=True)
class Random(Good):
    def advantages(self, signals: GroupSignals) -> Tensor:
        return torch.rand_like(signals.old_logprobs_GT).where(signals.mask_GT, 0.0)


@dataclass(frozen=True)
class InPlace(Good):
    def advantages(self, signals: GroupSignals) -> Tensor:
        advantages_GT = super().advantages(signals)
        signals.old_logprobs_GT[0, 0] = -9.0
        return advantages_GT


@dataclass(frozen=True)
class Overflowing(Good):
    def loss(self, batch: TrainBatch) -> Loss:
        squares_ST = ((batch.logprobs_ST - batch.old_logprobs_ST) * 20).where(batch.mask_ST, 0.0).exp()
        return Loss(squares_ST.where(batch.mask_ST, 0.0).sum() / batch.totals.tokens, {})


@dataclass(frozen=True)
class DividesByZero(Good):
    def advantages(self, signals: GroupSignals) -> Tensor:
        std = signals.rewards_G.std(correction=0)
        return super().advantages(signals) / std


@pytest.mark.parametrize(
    ("objective", "clause"),
    [
        (OwnMean(), "don't add up"),
        (Unmasked(), "depends on the values in the padding"),
        (Peeking(), "`advantages` depends on the values in the padding"),
        (NotOnlyRewards(), "depends on log-probabilities or entropies"),
        (Random(), "two different results"),
        (InPlace(), "in place"),
        (Overflowing(), "finite"),
        (DividesByZero(), r"NaN or infinite values for rewards \[0.0, 0.0, 0.0\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_suite_names_the_broken_clause(objective: Good, clause: str) -> None:
    with pytest.raises(UserError, match=clause) as error:
        check_objective(objective)
    assert type(objective).__name__ in str(error.value)
