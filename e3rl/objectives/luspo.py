"""LUSPO: GSPO whose responses weigh by their length."""

from __future__ import annotations

from dataclasses import dataclass

from e3rl.objectives import _common as common
from e3rl.objectives.gspo import GSPO


@dataclass(frozen=True)
class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation (arXiv 2602.05261): each response's sum in place of its mean."""

    mean = staticmethod(common.sequence_sum)
