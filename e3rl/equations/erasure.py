"""Segments and the erasure state machine: paper §3.1, §3.4 (eq 8, 23-25, 31). Uses no models, caches or tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from e3rl.types import Verdict


def segment_size(committed: int, segment_length: int, completion_limit: int) -> int:
    """Eq 8. Tokens of the next candidate: L, or fewer where the response reaches its limit."""
    return min(segment_length, completion_limit - committed)


def exceeds(uncertainty: float, threshold: float) -> bool:
    """Eq 24. The erasure trigger: U > Theta. At equality the candidate is accepted.

    Raises ValueError if either is NaN: comparisons with NaN are false, which would commit the candidate.
    """
    if math.isnan(uncertainty) or math.isnan(threshold):
        raise ValueError(f"a candidate can't be judged: uncertainty is {uncertainty}, threshold is {threshold}")
    return uncertainty > threshold


def judge(uncertainty: float, threshold: float, attempt: int, max_erasures: int) -> Verdict:
    """Eq 23-25. The operator's decision, or the forced accept when the budget of ``max_erasures`` is spent."""
    if not exceeds(uncertainty, threshold):
        return Verdict.COMMIT
    return Verdict.ERASE if attempt < max_erasures else Verdict.FORCED


def next_state(committed: int, candidate: int, attempt: int, verdict: Verdict) -> tuple[int, int]:
    """Eq 25. (committed tokens, attempt) after the verdict on a candidate of ``candidate`` tokens."""
    if verdict is Verdict.ERASE:
        return committed, attempt + 1
    return committed + candidate, 0


def least_uncertain(uncertainties: Sequence[float]) -> int:
    """Eq 25. What a forced accept commits where `on_exhausted` = 'least_uncertain': the smallest U, the earliest on a tie."""
    if any(math.isnan(u) for u in uncertainties):
        raise ValueError(f"attempts can't be compared: one has no uncertainty: {list(uncertainties)}")
    return min(range(len(uncertainties)), key=uncertainties.__getitem__)


def selection_weight(passes: bool, acceptance: float, max_erasures: int, spared: float) -> float:
    """Eq 23-26 (ours). w = q(s) / pi(s): how much oftener erasing commits such a segment than a plain draw would be it.

    Candidates are at or below the threshold with probability ``acceptance``, others are committed anyway with probability
    ``spared``, and the last attempt always is. The mean of w under pi is 1, and no w is below ``spared``.
    """
    ends = acceptance + (1 - acceptance) * spared
    forced = (1 - ends) ** max_erasures
    tried = (1 - forced) / ends if ends > 0 else float(max_erasures)
    return (1.0 if passes else spared) * tried + forced


def regeneration_ratio(erased_tokens: float, committed_tokens: float) -> float:
    """Eq 31. r: regenerated tokens per committed token."""
    return erased_tokens / committed_tokens
