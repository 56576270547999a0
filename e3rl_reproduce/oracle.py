"""For research: a metric that knows the lab's answers, as well as it is told to. It bounds what any judge of its AUROC could do.

``erasure.metric = "e3rl_reproduce.oracle:oracle_95"`` judges by the lab's step checker with Gaussian noise, so that a wrong
candidate has a larger U than a right one behind the same prefix with probability 0.95. Others: ``oracle_70``, ``oracle_85``,
``oracle_perfect``. With ``objective.credit_weight`` and ``erasure.max_erasures = 0`` the same labels are rewards, and nothing is
erased. No run that uses it says anything about a method that has to judge by itself.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from e3rl.config import ErasureConfig
from e3rl.errors import UserError
from e3rl.lab.problems import grade, step_correctness
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.rollout.metric import CandidatePlace, single_term
from e3rl.rollout.moments import Moments
from e3rl.types import Candidate, Draw, Problem, Uncertainty

_BY_CHARACTER = ("path", "ways")
"""Families in which every character is a whole step. In the others a step that reaches the end of the text may go on."""


@dataclass(frozen=True)
class Oracle:
    """U is the probability that a candidate is wrong, at even odds, after a measurement with this AUROC."""

    auroc: float

    def __call__(
        self,
        candidate: Candidate,
        history: Sequence[float],
        reference: Moments,
        config: ErasureConfig,
        place: CandidatePlace,
    ) -> Uncertainty:
        """U in [0, 1]: judged at 0.5, errors of both kinds are equally frequent. UserError where the problem isn't the lab's."""
        return single_term(suspicion(self.auroc, errs(place, candidate), place.draw))


def suspicion(auroc: float, wrong: bool, draw: Draw) -> float:
    """U of a candidate that is wrong or right. The noise depends on ``draw`` alone."""
    if auroc == 1:
        return float(wrong)
    separation = math.sqrt(2) * NormalDist().inv_cdf(auroc)  # between the means of two unit normals
    measured = _noise(draw) + separation * wrong
    return 1 / (1 + math.exp(-separation * (measured - separation / 2)))


def errs(place: CandidatePlace, candidate: Candidate) -> bool:
    """Whether the response's first wrong step is in the candidate, or it ends the response short of the answer.

    Behind an earlier mistake nothing is wrong: a retry there would be worth nothing.
    """
    before = _text(place.ids)
    text = before + _text(candidate.ids.tolist())
    if _mistake(place.prompt.problem, before, ended=False):
        return False
    return _mistake(place.prompt.problem, text, ended=candidate.ended)


def _mistake(problem: Problem, text: str, ended: bool) -> bool:
    """Whether the response is beyond repair."""
    if problem.columns.get("family") is None:
        raise UserError(f"the oracle judges lab problems alone (data.train = 'lab:…'), and '{problem.id}' is none")
    if ended and not grade(problem, text):
        return True
    whole = ended or problem.columns["family"] in _BY_CHARACTER
    return any(not step.right for step in step_correctness(problem, text) if whole or step.end < len(text))


def _noise(draw: Draw) -> float:
    """A standard normal number."""
    named = f"oracle/{draw.seed}/{draw.step}/{draw.prompt_id}/{draw.sibling}/{draw.segment}/{draw.attempt}"
    number = int.from_bytes(hashlib.blake2b(named.encode(), digest_size=6).digest())
    return NormalDist().inv_cdf((number + 0.5) / 2**48)


@functools.cache
def _tokenizer() -> Any:
    return build_tokenizer(4096, tools=True)


def _text(ids: Sequence[int]) -> str:
    return str(_tokenizer().decode(ids, skip_special_tokens=True)) if len(ids) else ""


oracle_70, oracle_85, oracle_95, oracle_perfect = map(Oracle, (0.70, 0.85, 0.95, 1.0))


def __getattr__(name: str) -> Any:
    """UserError for the objective that is a setting now."""
    if name == "StepCredit":
        raise UserError(
            "objective.name = 'e3rl_reproduce.oracle:StepCredit' is now objective.name = 'e3rl' with objective.credit_weight = 1"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
