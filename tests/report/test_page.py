"""What the page holds: whole, bounded, and with everything a model wrote kept as data."""

import base64
import gzip
import json
import random
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from e3rl.config import build_config
from e3rl.errors import UserError
from e3rl.report import write_report, write_token_view
from e3rl.report.embed import content_security_policy, to_json
from e3rl.report.overview import facts
from e3rl.report.page import RUN_SCRIPTS, TOKEN_SCRIPTS
from e3rl.report.rollouts import select
from e3rl.types import TERMS, Problem, Prompt
from tests.report.builder import (
    HOSTILE,
    SyntheticRun,
    Words,
    hostile_run,
    rewarded_group,
    tool_run,
    trajectory,
    write_rollouts,
)

ROOM = 1_000_000


class Elements(HTMLParser):
    """The elements of a page, and the text of its data blocks."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.tags: list[str] = []
        self.blocks: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self._inside = given.get("id") if str(given.get("type")).startswith("application/") else None
        self._packed = given.get("type") == "application/gzip"

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            text = gzip.decompress(base64.b64decode(data)).decode() if self._packed else data
            self.blocks[self._inside] = self.blocks.get(self._inside, "") + text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    return SyntheticRun(tmp_path_factory.mktemp("runs") / "demo").go(6, evaluate_every=3)


def blocks(path: Path) -> dict[str, str]:
    return Elements(path.read_text(encoding="utf-8")).blocks


def test_the_page_holds_the_run(run: SyntheticRun) -> None:
    path = write_report(run.path)
    assert path == run.path / "report.html"
    described = json.loads(blocks(path)["run"])["runs"][0]
    assert described["name"] == "demo"
    assert described["method"] == "E³RL"
    assert (described["step"], described["steps"], described["finished"]) == (6, 40, False)
    assert described["metrics"]["step"] == [1, 2, 3, 4, 5, 6]
    assert [(e["step"], e["mode"]) for e in described["evaluations"]] == [
        (step, mode) for step in (0, 3, 6) for mode in ("plain", "erasable")
    ]
    assert described["evaluations"][2]["tokens_total"] == 12000
    assert described["rollouts"] == {"shown": 96, "total": 96, "first_step": 1}
    assert all(len(column) == 96 for column in described["index"].values())


def test_rollouts_in_the_page_are_those_of_the_ledger(run: SyntheticRun) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(run.path / "rollouts" / "step-000003.parquet").to_pylist()[:4]
    group = json.loads(blocks(write_report(run.path))["rollouts-0-3"])["groups"][0]
    row = max(rows, key=lambda r: len(r["erasures"]))
    shown = group["rollouts"][row["sibling"]]
    assert group["problem"] == row["problem_id"]
    assert "".join(p for s in shown["segments"] for p in s["pieces"]) == row["response"]
    assert [e["pieces"] for e in shown["erasures"]] == [e["pieces"] for e in row["erasures"]]
    assert [s["u"][0] for s in shown["segments"]] == pytest.approx(
        [s["uncertainty"] for s in row["segments"]], abs=6e-4
    )
    assert [e["advantage"] for e in shown["erasures"]] == row["erased_advantages"]
    advantages = [a for s in shown["segments"] for a in [s["advantage"]] * len(s["pieces"])]
    assert advantages == pytest.approx(row["advantages"], abs=6e-4)
    shares = [x for s in shown["segments"] for x in s["share"]]
    assert shares == pytest.approx(row["shares"], rel=6e-3)


def test_the_index_counts_what_happened(run: SyntheticRun) -> None:
    import pyarrow.parquet as pq

    rows = [r for p in sorted((run.path / "rollouts").iterdir()) for r in pq.read_table(p).to_pylist()]
    index = select(run.path, ROOM).index()
    assert index["erased"] == [len(r["erasures"]) for r in rows]
    assert index["forced"] == [sum(s["verdict"] == "forced" for s in r["segments"]) for r in rows]
    assert index["tokens"] == [len(r["advantages"]) for r in rows]
    assert index["finished"] == [r["finish"] == "stop" for r in rows]
    group = [r for r in rows if (r["step"], r["problem_id"]) == (rows[0]["step"], rows[0]["problem_id"])]
    average = sum(r["reward"] for r in group) / len(group)
    assert index["flips"][: len(group)] == [
        sum(a * (r["reward"] - average) < 0 for a in r["advantages"]) for r in group
    ]


def test_a_list_shows_the_end_of_each_response(run: SyntheticRun) -> None:
    import pyarrow.parquet as pq

    rows = [r for p in sorted((run.path / "rollouts").iterdir()) for r in pq.read_table(p).to_pylist()]
    shown = select(run.path, ROOM).index()["snippet"]
    ends = [" ".join(r["response"].split()) for r in rows]
    assert [s.removeprefix("…") for s in shown] == [e[-39:] if len(e) > 40 else e for e in ends]
    assert any(s.startswith("…") for s in shown)


def test_accuracy_is_known_where_something_says_what_is_right(tmp_path: Path) -> None:
    def graded(name: str, *functions: str, answer: str | None) -> bool:
        made = SyntheticRun(tmp_path / name, rewards={"functions": list(functions)})
        group = rewarded_group(random.Random(1), made.tokenizer, "p", made.config, 0.5, answer)
        write_rollouts(made.path, 1, [group], made.tokenizer)
        return bool(json.loads(blocks(write_report(made.path))["run"])["runs"][0]["graded"])

    assert graded("checked", "math", answer=None)
    assert graded("compared", "mine.py:reward", answer="43")
    assert not graded("liked", "mine.py:reward", "math", answer=None)


def test_an_erased_turn_keeps_its_calls(tmp_path: Path) -> None:
    made = tool_run(tmp_path / "tools")
    rollout = json.loads(blocks(write_report(made.path))["rollouts-0-1"])["groups"][0]["rollouts"][0]
    (attempt, turn) = rollout["erasures"]
    assert "observation" not in attempt
    assert turn["observation"]["calls"] == [
        {"name": "add", "arguments": '{"a": 12}', "result": "{'error': 'b is missing'}", "failed": True}
    ]
    assert (turn["start"], turn["index"], turn["observation"]["evidence"]) == (0, 0, 1.0)
    kinds = ["observation" in s for s in rollout["segments"]]
    assert kinds == [False, True, False]
    assert rollout["segments"][1]["observation"]["calls"][0]["result"] == "47"


def test_older_rollouts_are_left_out_when_there_is_no_room(run: SyntheticRun) -> None:
    whole = select(run.path, ROOM)
    newest_two = sum(len(step.packed) + 110 * len(step.index) for step in whole.steps[-2:])
    chosen = select(run.path, newest_two)
    assert [step.step for step in chosen.steps] == [5, 6]
    assert chosen.total == 96


def test_a_step_too_large_for_the_page_gives_its_first_groups(run: SyntheticRun) -> None:
    chosen = select(run.path, 1)
    assert [step.step for step in chosen.steps] == [6]
    assert (len(chosen.steps[0].index), chosen.steps[0].total) == (4, 16)
    assert len(json.loads(chosen.steps[0].json)["groups"]) == 1


def test_packed_rollouts_take_a_fraction_of_the_room(run: SyntheticRun) -> None:
    step = select(run.path, ROOM).steps[0]
    assert len(step.packed) < 0.5 * len(step.json)


def test_a_step_written_again_is_read_again(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "demo").go(1)
    assert select(made.path, ROOM).steps[0].index[0]["problem"].startswith("chain-")
    group = rewarded_group(random.Random(1), made.tokenizer, "another", made.config, 0.5)
    write_rollouts(made.path, 1, [group], made.tokenizer)
    assert {row["problem"] for row in select(made.path, ROOM).steps[0].index} == {"another"}


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    described = json.loads(blocks(write_report(SyntheticRun(tmp_path / "new").path))["run"])["runs"][0]
    assert (described["step"], described["index"], described["rollouts"]["total"]) == (0, {}, 0)


def test_a_plain_run_has_no_thresholds(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "plain", rollout={"erase": False}, objective={"name": "grpo"}).go(1)
    segment = json.loads(blocks(write_report(made.path))["rollouts-0-1"])["groups"][0]["rollouts"][0]["segments"][0]
    assert (segment["u"], segment["theta"], segment["verdict"]) == (None, None, None)


@pytest.mark.parametrize(
    ("erasure", "words"),
    [
        ({}, "κ₀ = 1, group baseline"),
        ({"baseline": "quantile", "quantile": 0.2}, "quantile = 0.2, quantile baseline"),
        ({"baseline": "static", "static_baseline": 0.5}, "static_baseline = 0.5, static baseline"),
    ],
)
def test_the_setting_that_decides_on_erasures_is_told(erasure: dict[str, float], words: str) -> None:
    told = dict(facts(build_config({"erasure": erasure, "rollout": {"segment_length": 8, "max_segments": 1}})))
    assert told["Erasures"] == f"up to 5 a segment, {words}"
    assert told["Response"] == "up to 1 segment of 8 tokens"


def test_what_is_no_run_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path)


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "damaged").go(1)
    (made.path / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match=r"step-000001\.parquet is no whole rollout ledger"):
        write_report(made.path)


def test_hostile_text_stays_data(tmp_path: Path) -> None:
    made = hostile_run(tmp_path / "hostile")
    page = write_report(made.path).read_text(encoding="utf-8")
    elements = Elements(page)
    assert "img" not in elements.tags
    assert page.count("</script>") == elements.tags.count("script") == 4
    assert "\u2028" not in page.split('id="plotly"')[0]
    group = json.loads(elements.blocks["rollouts-0-1"])["groups"][0]
    assert (group["problem"], group["prompt"], group["answer"]) == (HOSTILE, HOSTILE, HOSTILE)
    rollout = group["rollouts"][0]
    assert rollout["error"] == HOSTILE
    assert all(HOSTILE in candidate["pieces"] for candidate in (*rollout["segments"], *rollout["erasures"]))


def test_json_for_pages_reads_back_and_holds_no_markup() -> None:
    text = to_json({"<&>": [HOSTILE, 1.5, None]})
    assert json.loads(text) == {"<&>": [HOSTILE, 1.5, None]}
    assert not re.search("[<>&\u2028\u2029]", text)


def test_only_the_pages_own_scripts_may_run() -> None:
    policy = content_security_policy(["alert(1)"])
    assert "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='" in policy
    assert policy.startswith("default-src 'none';")


def test_scripts_never_turn_text_into_markup() -> None:
    dangerous = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|</script"
    for name in {*RUN_SCRIPTS, *TOKEN_SCRIPTS}:
        code = (resources.files("e3rl.report") / "assets" / name).read_text(encoding="utf-8")
        assert not re.search(dangerous, code), name


def test_decoded_responses_are_a_page_of_their_own(tmp_path: Path) -> None:
    tokenizer = Words()
    prompt = Prompt(Problem("p1", "12+35=", answer="47"), tokenizer.ids("12", "+", "35", "="))
    response = trajectory(random.Random(3), tokenizer, prompt, 0, 3, erase=True)
    other = trajectory(random.Random(4), tokenizer, prompt, 1, 2, erase=False)
    path = write_token_view(tmp_path / "view.html", [response, other], tokenizer)
    group = json.loads(blocks(path)["group"])
    assert group["prompt"] == "12+35="
    assert [s["pieces"] for s in group["rollouts"][0]["segments"]] == [
        [tokenizer.words[i] for i in s.candidate.ids] for s in response.segments
    ]
    assert [len(r["erasures"]) for r in group["rollouts"]] == [len(response.erasures), 0]
    assert path.stat().st_size < 100_000


def test_the_pages_scripts_are_strict_and_know_the_terms_of_u(tmp_path: Path) -> None:
    group = rewarded_group(random.Random(1), Words(), "p", build_config({}), 0.5).group
    page = write_token_view(tmp_path / "view.html", group.trajectories, Words()).read_text(encoding="utf-8")
    assert '<script>(() => {\n"use strict";\n' in page
    assert f"const TERMS = {to_json(list(TERMS.values()))};" in page
    [view] = [json.loads(text) for text in Elements(page).blocks.values()]
    judged = [s["u"] for r in view["rollouts"] for s in r["segments"] if s["u"]]
    assert {len(u) for u in judged} == {1 + len(TERMS)}, "U, then its terms in the same order"
