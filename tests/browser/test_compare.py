"""Runs beside each other: their curves, their seeds, and their responses to the same problem."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from e3rl.report import write_report
from tests.browser.pages import RESPONSE_TOKEN, choose, open_view, rows_of, serving
from tests.report.builder import SyntheticRun, rewarded_group, write_rollouts


def test_two_runs_are_compared(page: Any, tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "demo").go(4)
    plain = SyntheticRun(tmp_path / "grpo", rollout={"erase": False}, objective={"name": "grpo"}).go(8)
    with serving(page, run.path, plain.path) as address:
        page.goto(address)  # several runs open on their comparison
        page.locator("#compare-reward").scroll_into_view_if_needed()
        page.wait_for_selector("#compare-reward svg .scatterlayer .trace >> nth=1")
        assert [r.split("\t")[:2] for r in page.locator(".summary tbody tr").all_inner_texts()] == [
            ["demo", "E³RL"],
            ["grpo", "GRPO"],
        ]
        look = "document.querySelector('#compare-reward .plot').data.map((d) => [d.line.color, d.line.dash])"
        both = page.evaluate(look)
        assert len({colour for colour, _ in both}) == len({dash for _, dash in both}) == 2
        page.get_by_role("checkbox", name="demo").uncheck()
        page.wait_for_function("document.querySelectorAll('#compare-reward .scatterlayer .trace').length === 1")
        assert page.evaluate(look) == both[1:]
        headings = page.locator("section.block:has(.charts) > h2:visible").all_inner_texts()
        assert headings[:2] == ["Held-out evaluation", "Learning"]
        assert "Tools" not in headings  # there are none in these runs: no heading above nothing


def heading_and_response(group: Any) -> tuple[str, list[str]]:
    return group.locator("> h2").inner_text(), group.locator(RESPONSE_TOKEN).all_text_contents()


def responses_of(run: SyntheticRun, step: int, problem: str) -> list[str]:
    """The first sibling's tokens, as the page shows them."""
    row = next(r for r in rows_of(run, step) if r["problem_id"] == problem)
    return [piece.replace("\n", "↵\n") for segment in row["segments"] for piece in segment["pieces"]]


def test_two_runs_on_the_same_problem(page: Any, tmp_path: Path) -> None:
    runs = [SyntheticRun(tmp_path / name).go(1) for name in ("first", "second")]
    shared, alone = rows_of(runs[0], 1)[0]["problem_id"], rows_of(runs[0], 1)[-1]["problem_id"]
    group = rewarded_group(random.Random(1), runs[1].tokenizer, shared, runs[1].config, 0.5)
    write_rollouts(runs[1].path, 1, [group], runs[1].tokenizer)
    with serving(page, *(run.path for run in runs)) as address:
        open_view(page, address, "Compare")
        page.locator(".pair .group").nth(1).wait_for()
        assert page.get_by_role("combobox", name="Problem to compare").inner_text().split() == [shared]
        assert alone != shared
        shown = [heading_and_response(page.locator(".pair .group").nth(i)) for i in (0, 1)]
        assert [words for _, words in shown] == [responses_of(run, 1, shared) for run in runs]
        assert [heading.rpartition(",")[2] for heading, _ in shown] == [" step 1", " step 1"]
        assert page.locator("#compare-reward").bounding_box()["y"] < page.locator(".pair").bounding_box()["y"]
        legends = page.locator(".pair .legend:not(.terms)").all_inner_texts()
        assert legends[0] == legends[1]
        page.locator(".pair .group").first.get_by_label("Colour by").select_option("improbability")
        assert page.locator(".pair .group").nth(1).get_by_label("Colour by").input_value() == "improbability"
        legends = page.locator(".pair .legend:not(.terms)").all_inner_texts()
        assert legends[0] == legends[1]
        assert "1 − p" in legends[0]


def test_two_checkpoints_on_the_same_problem(page: Any, tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "again").go(3)
    early = rewarded_group(random.Random(1), made.tokenizer, "again", made.config, 0.5)
    late = rewarded_group(random.Random(2), made.tokenizer, "again", made.config, 0.5)
    write_rollouts(made.path, 1, [early], made.tokenizer)
    write_rollouts(made.path, 3, [late], made.tokenizer)
    open_view(page, write_report(made.path).as_uri(), "Compare")
    page.locator(".pair .group").nth(1).wait_for()
    shown = [heading_and_response(page.locator(".pair .group").nth(i)) for i in (0, 1)]
    assert shown == [(f"again, step {step}", responses_of(made, step, "again")) for step in (1, 3)]
    choose(page, "Right", "0/1")
    page.wait_for_function("document.querySelectorAll('.pair .group > h2')[1].textContent.endsWith('step 1')")
    assert not page.locator("#compare-reward").is_visible()


def test_a_run_without_a_problem_met_twice_has_nothing_to_compare(page: Any, tmp_path: Path) -> None:
    page.goto(write_report(SyntheticRun(tmp_path / "once").go(1).path).as_uri())
    assert page.get_by_role("button", name="Rollouts", exact=True).is_visible()
    assert page.get_by_role("button", name="Compare", exact=True).count() == 0


def test_seeds_become_one_line_with_a_band(page: Any, tmp_path: Path) -> None:
    runs = [
        SyntheticRun(tmp_path / f"demo-s{seed}", run={"seed": seed, "name": f"demo-s{seed}"}).go(4).path
        for seed in (1, 2)
    ]
    with serving(page, *runs) as address:
        open_view(page, address, "Compare")
        label = "document.querySelector('#compare-reward [role=img]').getAttribute('aria-label')"
        assert page.evaluate(label).count("demo (E³RL), 2 seeds:") == 1
        page.get_by_role("checkbox", name="Seeds as bands").uncheck()
        assert page.evaluate(label).count("demo-s") == 2
