"""How rollouts behave: one test a sentence of docs/rollout.md, whose words are the test's first line."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tests.rollout import (
    test_semantics_erasing,
    test_semantics_judging,
    test_semantics_scheduling,
    test_semantics_turns,
)

PARTS = (test_semantics_erasing, test_semantics_judging, test_semantics_scheduling, test_semantics_turns)


def test_every_sentence_is_pinned():
    """docs/rollout.md and these files say the same sentences."""
    page = (Path(__file__).parents[2] / "docs/rollout.md").read_text(encoding="utf-8")
    documented = re.findall(r"^(\d+\. .*)$", re.sub(r"\n +", " ", page), re.MULTILINE)
    tests = [
        f for part in PARTS for name, f in inspect.getmembers(part, inspect.isfunction) if name.startswith("test_")
    ]
    firsts = [(f.__doc__ or "").splitlines()[:1] for f in tests]
    pinned = [line[0] for line in firsts if line and line[0][0].isdigit()]
    assert sorted(pinned, key=lambda s: int(s.split(".")[0])) == documented
    assert [int(s.split(".")[0]) for s in documented] == list(range(1, len(documented) + 1))
