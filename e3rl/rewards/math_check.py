"""Whether two answers are equal, by math-verify. Runs in the worker processes alone: some inputs never come back."""

from __future__ import annotations

import functools
import logging
from typing import Any

from math_verify import parse, verify

for _module in (
    "math_verify.parser",
    "math_verify.grader",
):  # they warn that their timeouts are off: the worker has its own
    logging.getLogger(_module).setLevel(logging.ERROR)


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    return parse(f"${answer}$", parsing_timeout=None)  # type: ignore[arg-type]


def equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer`` means the same as ``gold``. An inequality may answer an interval; a set has no order."""
    return bool(verify(_parsed(gold), _parsed(answer), allow_set_relation_comp=True, timeout_seconds=None))


equivalent("1", "2")  # builds math-verify's patterns while the worker loads, so that no answer's time pays for them
