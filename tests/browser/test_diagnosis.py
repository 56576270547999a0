"""The page of a diagnosis in a browser."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from e3rl.diagnose.diagnosis import RetryGain
from e3rl.diagnose.page import write_diagnosis
from tests.diagnose.test_diagnosis import BETTER, ZERO, diagnosis


def test_a_phone_shows_every_quarter_of_a_retrys_worth(page: Any, tmp_path: Path) -> None:
    gains = (RetryGain("U, paper", (ZERO, ZERO, BETTER, BETTER), (0.1, 0.2, 0.3)),)
    made = write_diagnosis(tmp_path, replace(diagnosis(avg=ZERO, passed=ZERO, within=ZERO), gains=gains))
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(made.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture = page.locator("figure", has_text="What is a retry worth?")
    picture.scroll_into_view_if_needed()
    labels = picture.locator(".xtick text")
    labels.last.wait_for()
    assert labels.all_text_contents() == ["calmestquarter", "second", "third", "mostsuspicious"]
    edges = [labels.nth(i).bounding_box() for i in range(4)]
    assert all(a["x"] + a["width"] < b["x"] for a, b in itertools.pairwise(edges))


def test_a_tables_first_heading_stands_over_its_names(page: Any, tmp_path: Path) -> None:
    page.goto(write_diagnosis(tmp_path, diagnosis(avg=ZERO, passed=ZERO, within=ZERO)).as_uri())
    heading = page.locator("section:last-of-type thead th").first
    assert heading.evaluate("node => getComputedStyle(node).textAlign") == "left"
