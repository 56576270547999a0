"""The erasure state machine: paper §3.4 (eq 23-26). Knows nothing of models, caches or tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from e3rl.types import Verdict


def exceeds(uncertainty: float, threshold: float) -> bool:
    """Eq 24. The erasure trigger: U > Theta. At equality the candidate is accepted.

    Raises ValueError where either is NaN: every comparison with NaN is false, which would commit the candidate unseen.
    """
    if math.isnan(uncertainty) or math.isnan(threshold):
        raise ValueError(f"a candidate can't be judged: uncertainty is {uncertainty}, threshold is {threshold}")
    return uncertainty > threshold


def judge(uncertainty: float, threshold: float, attempt: int, max_erasures: int) -> Verdict:
    """Eq 23-25. The operator's decision and, where the budget of ``max_erasures`` is spent, the forced accept."""
    if not exceeds(uncertainty, threshold):
        return Verdict.COMMIT
    return Verdict.ERASE if attempt < max_erasures else Verdict.FORCED


def next_state(
    prefix: tuple[int, ...], candidate: tuple[int, ...], attempt: int, verdict: Verdict
) -> tuple[tuple[int, ...], int]:
    """Eq 25. (committed prefix, attempt) after the verdict: erasing keeps the prefix, anything else extends it."""
    if verdict is Verdict.ERASE:
        return prefix, attempt + 1
    return prefix + candidate, 0


def retry_threshold(baseline: float, attempt: int, modulation: float, *, eta: float, delta: float) -> float:
    """Eq 26. Theta of the candidate redrawn after erasure number ``attempt``; gamma_e is Gamma(e) of eq 17.

    The baseline and the modulation are those of the first attempt: a retry moves neither (D4).
    """
    return baseline * math.exp(eta * attempt**delta) * modulation


def least_uncertain(uncertainties: Sequence[float]) -> int:
    """Eq 25. What a forced accept commits under D8 'least_uncertain': the smallest U, the earliest of equals."""
    if any(math.isnan(u) for u in uncertainties):
        raise ValueError(f"attempts can't be compared: one has no uncertainty: {list(uncertainties)}")
    return min(range(len(uncertainties)), key=uncertainties.__getitem__)
