"""How many cases each fuzz test tries, and how many were tried: ``E3RL_FUZZ=1000`` for a long session."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("E3RL_FUZZ", "20"))
tried: Counter[str] = Counter()


def fuzzed(test: Callable[..., Any]) -> Callable[..., Any]:
    """Put below ``@given``: counts the cases."""

    @functools.wraps(test)
    def counting(*arguments: Any, **options: Any) -> Any:
        tried[test.__name__] += 1
        return test(*arguments, **options)

    return counting


long = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
"""Settings of every fuzz test: the same cases each time in a short session, fresh ones in a long one."""
