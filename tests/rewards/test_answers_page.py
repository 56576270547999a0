"""Every example of ANSWERS.md is graded as the page says."""

from __future__ import annotations

import re
from pathlib import Path

from e3rl.rewards.grading import grade_all
from e3rl.rewards.pool import ProcessPool

PAGE = Path(__file__).parents[2] / "ANSWERS.md"
EXAMPLES = re.findall(r"^\| `(.+?)` \| ([=≠]) \| `(.+?)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_is_right():
    pool = ProcessPool(1, 5.0)
    try:
        grades = grade_all([(gold, pred) for gold, _, pred in EXAMPLES], pool)
    finally:
        pool.close()
    wrong = [(e, g) for e, g in zip(EXAMPLES, grades, strict=True) if g.correct is not (e[1] == "=")]
    assert wrong == []
    assert len(EXAMPLES) >= 70
