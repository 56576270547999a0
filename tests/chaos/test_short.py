"""The chaos tests in short: some kills and some damaged files of one small run."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.artefacts import Payload
from tests.chaos.canary import command
from tests.chaos.cluster import simulate
from tests.chaos.damage import judge, try_damage
from tests.chaos.faults import try_faults, try_power_cuts
from tests.chaos.kills import RECIPE, Life, chaos
from tests.chaos.neighbours import try_neighbours

SMALL = (
    RECIPE.replace("steps = 7", "steps = 2")
    .replace("save_steps = 3", "save_steps = 1")
    .replace("eval_steps = 4", "eval_steps = 0")
    .replace("[eval]\nlimit = 2", "[eval]\nlimit = 1\nerasable = false")
)


def test_killed_runs_end_in_the_same_bits(tmp_path: Path):
    tally = chaos(tmp_path, kills=3, seed=5, recipe=SMALL)
    assert tally.wrong == []
    assert (tally.kills, tally.identical) == (3, tally.runs)
    assert tally.resumes > 0
    assert len(tally.wheres) >= 2


def test_damaged_files_are_named_or_make_no_difference(tmp_path: Path):
    verdicts = try_damage(tmp_path, seconds=60, trials=8, seed=3)
    assert verdicts.wrong == []
    assert verdicts.ended["identical"] > 0


def test_failing_calls_end_in_a_sentence_or_the_same_bits(tmp_path: Path):
    verdicts = try_faults(tmp_path, seconds=60, trials=6)
    assert verdicts.wrong == []
    assert sum(verdicts.ended.values()) > 0


def test_after_a_power_cut_what_was_synced_is_enough(tmp_path: Path):
    verdicts = try_power_cuts(tmp_path, seconds=60, trials=4)
    assert verdicts.wrong == []
    assert verdicts.ended["identical"] > 0


def test_a_simulated_cluster_loses_nothing_and_mixes_nothing():
    counts = simulate(range(12))
    assert counts["groups"] > 100
    for kind in (
        "death",
        "request lost",
        "answer lost",
        "repeated",
        "trainer died",
        "weights offered in shared memory",
    ):
        assert counts[kind] > 0, kind
    simulate(range(205, 206))  # once, an answer with the same group twice ended the run
    assert simulate(range(3)) == simulate(range(3)), "a seed names the whole course of events"
    opened = os.listdir("/proc/self/fd")
    simulate(range(3))
    assert len(os.listdir("/proc/self/fd")) <= len(opened), "workers and trainers that end leave nothing open"


def test_streams_are_as_alone_beside_fuzzed_requests():
    found = try_neighbours(40)
    assert found.wrong == []
    assert sum(found.streams.values()) > 0
    assert {"200", "400"} <= found.statuses.keys()


def test_the_canary_dies_where_code_runs(tmp_path: Path):
    (hostile := tmp_path / "hostile").mkdir()
    payload = Payload(hostile)
    command(["decode", "lab", f"rollout.engine={payload.plugin}"], hostile, tmp_path)
    assert "the mark" in payload.tripped(tmp_path / "events")
    assert any(seen.startswith("exec ") for seen in payload.tripped(tmp_path / "events"))


WHOLE: dict[str, Any] = {
    "weights": b"w",
    "metrics": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}],
    "evaluations": [{"step": 0, "avg@2": 0.5}, {"step": 1, "avg@2": 1.0}],
    "rollouts": {"step-000001.parquet": [1], "step-000002.parquet": [2]},
    "summary": {"before": {"plain": 0.5}, "after": {"plain": 1.0}, "r": 0.1, "erase_rate": 0.2, "steps": 2},
    "litter": [],
    "files": ["config.toml", "metrics.jsonl"],
}
LOST_METRICS = {"metrics": WHOLE["metrics"][1:], "summary": {**WHOLE["summary"], "r": 0.3, "erase_rate": 0.1}}
LOST_EVALUATIONS = {"evaluations": WHOLE["evaluations"][1:], "summary": {**WHOLE["summary"], "before": {}}}
NAMED = "metrics.jsonl: nothing is logged of step 1; curves and summary lack what is missing"
MISSING = "evaluations.jsonl: 1 of 2 evaluations before step 2 are missing; curves and summary lack them"
REFUSED = "e3rl: runs/r was started with other settings, by its config.toml: run.seed (2 then, 0 now)"


@pytest.mark.parametrize(
    ("file", "status", "changes", "said", "well"),
    [
        ("journal/step-000003.journal", 0, {}, "", True),
        ("journal/step-000003.journal", 0, {"weights": b"v"}, "its last 9 bytes are incomplete", False),
        ("checkpoints/step-000002/state.json", 0, {"weights": b"v"}, "is damaged: state.json is missing", False),
        ("metrics.jsonl", 0, LOST_METRICS, NAMED, True),
        ("metrics.jsonl", 0, LOST_METRICS, "a damaged line is skipped", False),
        ("metrics.jsonl", 0, LOST_METRICS, NAMED.replace("step 1", "step 2"), False),
        ("metrics.jsonl", 0, {**LOST_METRICS, "weights": b"v"}, NAMED, False),
        ("metrics.jsonl", 0, {**LOST_METRICS, "files": ["config.toml"]}, NAMED, False),
        ("metrics.jsonl", 0, LOST_METRICS, f"{NAMED}\nthe file as it was is kept as metrics.jsonl.damaged", False),
        ("evaluations.jsonl", 0, LOST_EVALUATIONS, MISSING, True),
        ("evaluations.jsonl", 0, LOST_EVALUATIONS, "evaluations.jsonl: can't read line 1; left out", False),
        ("evaluations.jsonl", 0, LOST_METRICS, NAMED, False),
        ("config.toml", 2, {}, REFUSED, True),
        ("config.toml", 2, {}, "config.toml\ne3rl: something is damaged", False),
        ("config.toml", 1, {}, REFUSED, False),
        ("config.toml", 2, {}, f"Traceback (most recent call last)\n{REFUSED}", False),
    ],
)
def test_the_verdict_takes_no_other_sentence(
    file: str, status: int, changes: dict[str, Any], said: str, well: bool, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("tests.chaos.damage.outcome", lambda run: {**WHOLE, **changes})
    _, wrong = judge(Path(file), WHOLE, Life(status, 1.0, 0), said, tmp_path)
    assert (not wrong) is well, wrong
