"""A complete objective from outside the package: REINFORCE with a leave-one-out baseline (RLOO).

Train with it:   e3rl train RECIPE objective.name=examples/objective_reinforce.py:Reinforce
With an option:  ... objective.entropy_weight=0.01

An objective is a frozen dataclass. Its fields are its options, each with a default, a meaning and a range; they are
read from the [objective] section and checked before training starts. It has two pure methods: `advantages` sees the
siblings of one prompt, `loss` sees a micro-batch. Run the contract suite on your own, as the last lines do.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from e3rl.config import setting
from e3rl.objectives.base import GroupSignals, Loss, Need, TrainBatch, TrajectoriesOnly
from e3rl.objectives.metrics import measured


@dataclass(frozen=True)
class Reinforce(TrajectoriesOnly):
    """The log-probability of a response, weighted by its reward against the mean of the others (arXiv 2402.14740)."""

    entropy_weight: float = setting(0.0, "weight of -log pi as a reward of its own: keeps exploring", min=0)

    needs = frozenset[Need]()

    def advantages(self, signals: GroupSignals) -> Tensor:
        """r_i minus the mean of the other siblings' rewards; 0 for a single one."""
        rewards_G, siblings = signals.rewards_G, len(signals.rewards_G)
        others_G = (rewards_G.sum() - rewards_G) / max(siblings - 1, 1)
        baseline_G = others_G if siblings > 1 else rewards_G
        bonus_GT = -self.entropy_weight * signals.old_logprobs_GT
        return ((rewards_G - baseline_G)[:, None] + bonus_GT).where(signals.mask_GT, 0.0)

    def loss(self, batch: TrainBatch) -> Loss:
        """-A log pi summed over a response, averaged over the responses of the whole step."""
        logprobs_ST = batch.logprobs_ST.where(batch.mask_ST, 0.0)
        value = -(batch.advantages_ST * logprobs_ST).sum() / batch.totals.sequences
        return Loss(value, measured(batch.mask_ST, {"logprob": logprobs_ST}))


if __name__ == "__main__":
    from e3rl.testing.objective import check_objective

    check_objective(Reinforce())
    print("Reinforce keeps the contract of an objective.")
