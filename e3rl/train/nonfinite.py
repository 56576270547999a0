"""NaN, infinite and exploding numbers of a training step: found before they reach a weight, and said where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e3rl.config import TrainConfig
from e3rl.errors import UserError
from e3rl.objectives.base import TrainBatch
from e3rl.train.sequences import TrainSequence


@dataclass(frozen=True)
class Finding:
    """What is sick and where. ``group``: position in the step; fields that a kind does not have are None or empty."""

    what: str
    value: float
    group: int | None = None
    sibling: int | None = None
    segment: int | None = None
    token: int | None = None  # of the response
    erased: bool = False
    parameters: tuple[str, ...] = ()

    def sentence(self, prompt_id: str | None = None) -> str:
        """The finding in words."""
        of = (
            [f"prompt '{prompt_id}'" if prompt_id is not None else f"group {self.group}"]
            if self.group is not None
            else []
        )
        of += [f"{name} {v}" for name, v in (("sibling", self.sibling), ("segment", self.segment)) if v is not None]
        of += [f"response token {self.token}"] * (self.token is not None) + ["an erased candidate"] * self.erased
        if self.parameters:
            shown = ", ".join(self.parameters[:3]) + (", …" if len(self.parameters) > 3 else "")
            of.append(f"{len(self.parameters)} parameters ({shown})")
        return f"the {self.what} is {self.value:g}" + (f" at {', '.join(of)}" if of else "")


class SickNumbers(UserError):
    """A training step has numbers that must not reach the weights, which were left as they were."""

    def __init__(self, finding: Finding, update: int) -> None:
        self.finding, self.update = finding, update
        super().__init__(
            f"{finding.sentence()}, at optimizer update {update}; the weights were left as they were. "
            "Look at this step's rollouts, lower train.learning_rate or use float32."
        )


def find_sick(
    sequences: Sequence[TrainSequence], batch: TrainBatch, loss: Tensor, config: TrainConfig
) -> Finding | None:
    """The first sick number of a micro-batch, whose rows are ``sequences``; None where all are well.

    One question to the device where all is well; where not, it is looked for.
    """
    logprobs_ST, old_ST, reference_ST = (
        batch.logprobs_ST.detach(),
        batch.old_logprobs_ST,
        batch.reference_logprobs_ST,
    )
    kinds = {
        "log-probability": logprobs_ST,
        "old log-probability": old_ST,
        **({} if reference_ST is None else {"reference log-probability": reference_ST}),
        "advantage": batch.advantages_ST,
    }
    bad = {what: ~values_ST.isfinite() & batch.mask_ST for what, values_ST in kinds.items()}
    far_ST = (logprobs_ST - old_ST).abs() * batch.mask_ST
    kl_S = _kl(logprobs_ST, reference_ST, batch.mask_ST)
    suspicious = [found_ST.any() for found_ST in bad.values()] + [~loss.detach().isfinite()]
    suspicious += [far_ST.amax() > config.max_log_ratio, kl_S.amax() > config.max_kl]
    if not bool(torch.stack(suspicious).any()):
        return None
    for what, values_ST in kinds.items():
        if bool(bad[what].any()):
            row, token = divmod(int(bad[what].flatten().int().argmax()), values_ST.shape[1])
            return _at(sequences[row], what, float(values_ST[row, token]), token)
    if float(far_ST.amax()) > config.max_log_ratio:
        row, token = divmod(int(far_ST.argmax()), far_ST.shape[1])
        return _at(sequences[row], "log of a token's probability ratio", float(far_ST[row, token]), token)
    if float(kl_S.amax()) > config.max_kl:
        row = int(kl_S.argmax())
        return _at(sequences[row], "mean KL to the reference policy", float(kl_S[row]), None)
    return Finding("loss", float(loss.detach()), group=sequences[0].group if len(sequences) == 1 else None)


def _kl(logprobs_ST: Tensor, reference_ST: Tensor | None, mask_ST: Tensor) -> Tensor:
    """Mean k3 estimate of each row; 0 without a reference."""
    if reference_ST is None:
        return logprobs_ST.new_zeros(1)
    gap_ST = ((reference_ST - logprobs_ST) * mask_ST).double()
    return ((gap_ST.exp() - gap_ST - 1) * mask_ST).sum(1) / mask_ST.sum(1).clamp(min=1)


def _at(sequence: TrainSequence, what: str, value: float, token: int | None) -> Finding:
    segment = None if token is None else int(sequence.segments_T[token])
    return Finding(what, value, sequence.group, sequence.sibling, segment, token, sequence.erased)
