"""The page in a browser: it can be read, filtered, unfolded, kept alive, and not be taken over."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from e3rl.report import write_report, write_token_view
from e3rl.train.run_directory import read_lines
from e3rl.types import Problem, Prompt
from tests.browser.pages import RESPONSE_TOKEN, choose, open_view, report, rows_of, serving
from tests.report.builder import HOSTILE, SyntheticRun, Words, hostile_run, many_rollouts, tool_run, trajectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    made = SyntheticRun(tmp_path_factory.mktemp("runs") / "demo").go(12, evaluate_every=6)
    write_report(made.path)
    return made


def test_the_overview_is_drawn(page: Any, run: SyntheticRun) -> None:
    page.goto(report(run))
    assert page.locator("h1").inner_text() == "demo"
    assert "step 12 of 40" in page.locator(".lede").inner_text()
    assert page.locator(".health li").count() >= 1
    page.wait_for_selector("#chart-avg svg .scatterlayer .trace")
    chart = page.locator("#chart-reward")
    chart.scroll_into_view_if_needed()
    page.wait_for_selector("#chart-reward svg .scatterlayer .trace")
    assert chart.locator("[role=img]").get_attribute("aria-label").startswith("Reward by step. 0.")
    chart.get_by_text("Table").click()
    chart.locator("tbody tr").first.wait_for()
    assert chart.locator("tbody tr").count() == 12


def test_few_tokens_are_counted_out(page: Any, tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "short").go(1)
    metrics = made.path / "metrics.jsonl"
    (record,) = read_lines(metrics)
    metrics.write_text(json.dumps(record | {"tokens_total": 253}) + "\n", encoding="utf-8")
    page.goto(write_report(made.path).as_uri())
    assert page.locator(".tile", has_text="tokens generated").locator(".value").inner_text() == "253"


def test_speed_is_told_for_the_whole_step_and_by_part(page: Any, run: SyntheticRun) -> None:
    page.goto(report(run))
    label = page.locator("#chart-tokens_per_second [role=img]").get_attribute("aria-label")
    last = read_lines(run.path / "metrics.jsonl")[-1]
    assert [part.split(":")[0] for part in label.split(". ")[1:4]] == ["whole step", "rollout alone", "training alone"]
    told = float(re.search(r"rollout alone: .*?, ([\d.]+) at 12", label)[1])
    assert told == pytest.approx(last["tokens"] / last["seconds_rollout"], rel=0.01)


def test_curves_can_be_drawn_over_tokens(page: Any, run: SyntheticRun) -> None:
    page.goto(report(run))
    choose(page, "Curves over", "tokens")
    label = page.locator("#chart-reward [role=img]").get_attribute("aria-label")
    assert label.startswith("Reward by tokens generated.")
    assert "at 48 k" in label


def test_segments_have_a_line_each(page: Any, run: SyntheticRun) -> None:
    open_view(page, report(run), "Segments")
    page.wait_for_selector("figure >> nth=0 >> svg .scatterlayer .trace >> nth=3")
    assert page.locator("figure").first.locator(".scatterlayer .trace").count() == 4
    labels = [chart.get_attribute("aria-label") for chart in page.locator("figure [role=img]").all()]
    assert [label.split(" by step")[0] for label in labels] == [
        "Uncertainty U",
        "Threshold Θ",
        "Baseline B",
        "Penalty Γ",
        "Modulation φ",
        "Acceptance",
        "Advantage",
        "Clip fraction",
    ]
    assert all("segment 4: " in label for label in labels)


def test_filters_and_orders(page: Any, run: SyntheticRun) -> None:
    open_view(page, report(run), "Rollouts")
    assert page.get_by_role("status").filter(has_text="rollout").inner_text() == "192 rollouts"
    choose(page, "Step", "3")
    rows = rows_of(run, 3)
    assert page.locator(".list > p").inner_text() == f"{len(rows)} rollouts"
    choose(page, "Order", "erased")
    assert f"{max(len(r['erasures']) for r in rows)} erased" in page.locator(".row").first.inner_text()
    choose(page, "Reward", "right")
    right = sum(r["reward"] == 1 for r in rows)
    assert page.locator(".list > p").inner_text() == f"{right} rollout" + ("s" if right != 1 else "")
    choose(page, "Reward", "any")
    page.get_by_label("Problem").fill(rows[0]["problem_id"])
    assert page.locator(".list > p").inner_text() == "4 rollouts"


def test_an_erased_attempt_unfolds_above_what_replaced_it(page: Any, run: SyntheticRun) -> None:
    row = max(rows_of(run, 12), key=lambda r: len(r["erasures"]))
    open_view(page, report(run), "Rollouts")
    choose(page, "Step", "12")
    page.locator(".row", has_text=f"{row['problem_id']} #{row['sibling']}").click()
    index = row["erasures"][0]["index"]
    erased = [e for e in row["erasures"] if e["index"] == index]
    segment = page.locator(".segment").nth(index)
    assert not segment.locator(".attempt").first.is_visible()
    segment.locator(".erased summary").click()
    assert segment.locator(".attempt").count() == len(erased)
    shown = segment.locator(".attempt del").first
    assert shown.locator(".token").all_text_contents() == [p.replace("\n", "↵\n") for p in erased[0]["pieces"]]
    assert "line-through" in shown.evaluate("node => getComputedStyle(node).textDecorationLine")
    following = (erased[1:] or [row["segments"][index]])[0]
    words = "less" if following["uncertainty"] < erased[0]["uncertainty"] else "more"
    reason = segment.locator(".why").first.inner_text()
    assert "Erased because U" in reason
    assert f"What was drawn instead is {words} uncertain: U {following['uncertainty']:.3f}" in reason
    contrast = "−1" if row["erased_advantages"][0] < 0 else "0"
    assert segment.locator(".attempt header").first.inner_text().endswith(f"advantage as contrast {contrast}")
    assert segment.locator(".attempt").first.bounding_box()["y"] < segment.locator("> .tokens").bounding_box()["y"]


def test_hover_and_keys_tell_a_tokens_numbers(page: Any, run: SyntheticRun) -> None:
    row = rows_of(run, 12)[0]
    open_view(page, report(run), "Rollouts")
    choose(page, "Step", "12")
    page.locator(".row", has_text=f"{row['problem_id']} #{row['sibling']}").click()
    tokens = page.locator(RESPONSE_TOKEN)
    tooltip = page.get_by_role("tooltip")
    tokens.nth(1).hover()
    assert f"{row['segments'][0]['entropies'][1]:.3f} nats" in tooltip.inner_text()
    page.mouse.move(0, 0)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert f"{row['segments'][0]['entropies'][2]:.3f} nats" in tooltip.inner_text()
    page.keyboard.press("Escape")
    assert not tooltip.is_visible()


def test_siblings_stand_side_by_side(page: Any, run: SyntheticRun) -> None:
    open_view(page, report(run), "Rollouts")
    page.locator(".row").first.click()
    page.get_by_role("button", name="Side by side").click()
    boxes = [box.bounding_box() for box in page.locator(".response").all()]
    assert len(boxes) == 4
    assert len({round(box["y"]) for box in boxes}) == 1
    assert [box["x"] for box in boxes] == sorted({box["x"] for box in boxes})


def test_the_list_is_worked_by_keys(page: Any, run: SyntheticRun) -> None:
    open_view(page, report(run), "Rollouts")
    page.get_by_role("listbox").focus()
    choose(page, "Order", "newest")
    page.get_by_role("listbox").focus()
    page.keyboard.press("Home")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    assert page.locator(".row[aria-selected=true]").get_attribute("aria-posinset") == "3"
    page.keyboard.press("End")
    page.wait_for_selector(".row[aria-posinset='192'][aria-selected=true]")
    assert page.locator(".group h2").inner_text().endswith("step 1")


def test_an_address_leads_back_to_a_rollout(page: Any, run: SyntheticRun) -> None:
    open_view(page, report(run), "Rollouts")
    choose(page, "Step", "5")
    page.locator(".row").nth(2).click()
    heading = page.locator(".group h2").inner_text()
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    assert page.locator(".group h2").inner_text() == heading
    assert page.locator(".sibling[aria-pressed=true]").inner_text().startswith("#")


def test_an_address_marks_its_row_and_brings_it_into_sight(page: Any, run: SyntheticRun) -> None:
    row = rows_of(run, 2)[9]
    named = f"view=rollouts&step=2&problem={row['problem_id']}&sibling={row['sibling']}"
    page.goto(f"{report(run)}#{named}")
    marked = page.locator(".row[aria-selected=true]")
    marked.wait_for()
    assert f"{row['problem_id']} #{row['sibling']}" in marked.inner_text()
    inside, rows = marked.bounding_box(), page.locator(".rows").bounding_box()
    assert rows["y"] <= inside["y"]
    assert inside["y"] + inside["height"] <= rows["y"] + rows["height"] + 1
    page.locator(".sibling").nth(1).click()
    other = page.locator(".sibling[aria-pressed=true]").inner_text().split()[0]
    assert f"{row['problem_id']} {other}" in marked.inner_text()


def test_rollouts_open_on_the_most_erased(page: Any, run: SyntheticRun) -> None:
    rows = [(r, step) for step in range(1, 13) for r in rows_of(run, step)]
    most = max(len(r["erasures"]) for r, _ in rows)
    open_view(page, report(run), "Rollouts")
    marked = page.locator(".row[aria-selected=true]")
    marked.wait_for()
    assert marked.get_attribute("aria-posinset") == "1"
    assert f"{most} erased" in marked.inner_text()
    row = next(
        r for r, _ in reversed(rows) if marked.locator(".name").inner_text() == f"{r['problem_id']} #{r['sibling']}"
    )
    assert marked.locator(".snippet").inner_text().endswith(" ".join(row["response"].split())[-30:])


def test_a_response_reads_as_one_text_with_what_was_erased_in_its_place(page: Any, run: SyntheticRun) -> None:
    row = max(rows_of(run, 12), key=lambda r: len(r["erasures"]))
    page.goto(f"{report(run)}#view=rollouts&step=12&problem={row['problem_id']}&sibling={row['sibling']}&text=1")
    reading = page.locator(".reading")
    reading.wait_for()
    expected = []
    for n, segment in enumerate(row["segments"]):
        gone = [e["pieces"] for e in row["erasures"] if e["index"] == n]
        expected += [("DEL", "".join(pieces)) for pieces in gone] + [("DIV", "".join(segment["pieces"]))]
    parts = reading.evaluate("node => [...node.children].map((n) => [n.tagName, n.textContent])")
    assert [(kind, text) for kind, text in parts] == [(kind, text.replace("\n", "↵\n")) for kind, text in expected]
    choose(page, "Show", "segments")
    assert reading.count() == 0
    assert "text=1" not in page.url


def test_an_erased_turn_stands_struck_through_beside_the_call_that_replaced_it(page: Any, tmp_path: Path) -> None:
    open_view(page, write_report(tool_run(tmp_path / "tools").path).as_uri(), "Rollouts")
    turn = page.locator("details.turn")
    turn.wait_for()
    assert turn.locator("> summary").inner_text() == "Erased turn 1: add failed"
    struck = turn.locator("del").last
    assert struck.is_visible()
    assert "line-through" in struck.evaluate("node => getComputedStyle(node).textDecorationLine")
    assert struck.locator(".call").inner_text() == 'add({"a": 12})'
    assert struck.locator(".result").inner_text() == "{'error': 'b is missing'}"
    assert "the evidence against it, 1, was above 0.5" in turn.inner_text().replace("0.500", "0.5")
    instead = turn.locator(".instead + .calls, .instead .calls")
    assert instead.locator(".call").inner_text() == 'add({"a": 12, "b": 35})'
    assert instead.locator(".result").inner_text() == "47"
    assert turn.locator(".erased summary").inner_text() == "1 erased attempt within it"
    assert page.locator(".segment > .erased:not(.turn)").count() == 0
    assert page.locator(".answer-of-tools .call").inner_text() == 'add({"a": 12, "b": 35})'
    choose(page, "Show", "text")
    assert page.locator(".reading > *").evaluate_all("found => found.map((n) => n.tagName + '.' + n.className)") == [
        "DEL.",
        "DEL.turn",
        "DIV.tokens kept",
        "DIV.between",
        "DIV.tokens kept",
    ]


def test_the_first_screen_has_reward_and_held_out_curves(page: Any, run: SyntheticRun) -> None:
    page.goto(report(run))
    page.wait_for_selector("#chart-reward svg .scatterlayer .trace")
    for chart in ("#chart-reward", "#chart-avg"):
        box = page.locator(chart).bounding_box()
        assert box["y"] + box["height"] < 860, chart
    assert not page.locator(".what .facts").is_visible()
    page.get_by_text("What was run").click()
    assert page.locator(".what .facts").is_visible()
    rewards = [line["reward"] for line in read_lines(run.path / "metrics.jsonl")][-10:]
    assert page.locator(".tile", has_text="reward").first.locator(".value").inner_text() == f"{sum(rewards) / 10:.2f}"


def test_noise_does_not_look_like_jumps(page: Any, tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "flat").go(60)
    metrics = made.path / "metrics.jsonl"
    lines = [record | {"length": 100 + record["step"] % 2, "finish_ratio": 0.95} for record in read_lines(metrics)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page.goto(write_report(made.path).as_uri())
    page.locator("#chart-length").scroll_into_view_if_needed()
    page.wait_for_selector("#chart-length svg .scatterlayer .trace")
    low, high = page.evaluate("document.querySelector('#chart-length .plot').layout.yaxis.range")
    assert low < 90
    assert high > 110
    raw, smooth = page.evaluate("document.querySelector('#chart-length .plot').data.map((d) => d.y.slice(10, 20))")
    assert max(raw) - min(raw) == 1
    assert max(smooth) - min(smooth) == pytest.approx(0.2, abs=0.01)
    choose(page, "Smoothing", "1")
    page.wait_for_function("document.querySelector('#chart-length .plot').data.length === 1")


def test_a_wide_table_says_that_there_is_more(page: Any, run: SyntheticRun) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    open_view(page, report(run), "Segments")
    chart = page.locator("figure").first
    chart.get_by_text("Table").click()
    chart.locator(".scroll-frame.more").wait_for()
    chart.locator(".table-scroll").evaluate("node => { node.scrollLeft = node.scrollWidth; }")
    chart.locator(".scroll-frame:not(.more)").wait_for()


def test_dark_and_light(page: Any, run: SyntheticRun) -> None:
    page.goto(report(run))
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.get_by_role("button", name="Light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before


def test_a_phone_needs_no_sideways_scrolling(page: Any, run: SyntheticRun) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(report(run))
    for view in ("Overview", "Segments", "Rollouts"):
        page.get_by_role("button", name=view, exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
    page.locator(".row").first.click()
    page.wait_for_selector(RESPONSE_TOKEN)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_follows_a_run(page: Any, tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "live").go(2)
    with serving(page, made.path) as address:
        page.goto(address)
        page.get_by_text("step 2 of 40").wait_for()
        made.go(3)
        page.get_by_text("step 5 of 40").wait_for()
        page.get_by_role("button", name="Rollouts", exact=True).click()
        choose(page, "Order", "newest")
        page.locator(".row").first.click()
        page.wait_for_function("document.querySelector('.group h2').textContent.endsWith('step 5')")
        made.go(1)
        page.get_by_text("96 rollouts").wait_for()
        assert page.locator(".group h2").inner_text().endswith("step 5")


def test_ten_thousand_rollouts_stay_usable(page: Any, tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "many")
    assert many_rollouts(made.path, steps=25, groups=100, config=made.config) == 10_000
    path = write_report(made.path)
    assert path.stat().st_size < 30_000_000
    page.goto(path.as_uri())
    page.wait_for_selector("h1")
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 2000
    page.get_by_role("button", name="Rollouts", exact=True).click()
    page.get_by_text("10000 rollouts", exact=True).wait_for()
    assert page.locator(".row").count() < 60
    page.get_by_role("listbox").focus()
    page.keyboard.press("End")
    page.wait_for_selector(".row[aria-posinset='10000'][aria-selected=true]")
    page.wait_for_selector(RESPONSE_TOKEN)
    assert page.locator(".row").count() < 60
    took = page.evaluate(
        """() => {
            const before = performance.now();
            const box = document.querySelector('.filters input');
            box.value = 'p042';
            box.dispatchEvent(new Event('input'));
            return performance.now() - before;
        }"""
    )
    assert page.locator(".list > p").inner_text() == "100 rollouts"
    assert took < 500


def test_hostile_text_is_shown_and_not_run(page: Any, tmp_path: Path) -> None:
    made = hostile_run(tmp_path / "hostile")
    open_view(page, write_report(made.path).as_uri(), "Rollouts")
    page.locator(".row").first.click()
    page.wait_for_selector(RESPONSE_TOKEN)
    assert HOSTILE in page.locator(RESPONSE_TOKEN).first.text_content()
    assert page.locator(".gold").inner_text().startswith("</script><script>")
    assert page.evaluate("window.hacked") is None
    assert page.locator("#page img").count() == 0


def test_injected_scripts_would_not_run_either(browser: Any, run: SyntheticRun) -> None:
    """The security policy, in case a script of the page should ever make markup of text."""
    page = browser.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(report(run))
    page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.hacked = 1';
            document.body.append(script);
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in message for message in messages)
    page.close()


def test_decoded_responses_have_a_page(page: Any, run: SyntheticRun, tmp_path: Path) -> None:
    tokenizer = Words()
    prompt = Prompt(Problem("p", "12+35="), tokenizer.ids("12", "+", "35", "="))
    responses = [trajectory(random.Random(s), tokenizer, prompt, s, 3, erase=True) for s in range(2)]
    page.goto(write_token_view(tmp_path / "view.html", responses, tokenizer).as_uri())
    assert page.locator(RESPONSE_TOKEN).count() == responses[0].committed_tokens
    assert page.locator("pre").inner_text() == "12+35="
    assert page.locator(".badge.missing").count() == 0
    page.get_by_role("button", name="Side by side").click()
    assert page.locator(RESPONSE_TOKEN).count() == sum(r.committed_tokens for r in responses)
