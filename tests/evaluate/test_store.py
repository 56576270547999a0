"""The directory of an evaluation: whole groups only, one owner, one writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from e3rl.config import load_config
from e3rl.errors import UserError
from e3rl.evaluate.compare import compare
from e3rl.evaluate.evaluation import even_sizes, round_sizes
from e3rl.evaluate.identity import decoding, identity, settings_digest
from e3rl.evaluate.store import SampleStore, Shard, Unit
from e3rl.evaluate.study import SamplingPlan
from tests.evaluate.build import sample

IDENTITY = {"weights": "w", "data": {"source": "d", "answers": "x", "problems": 2}, "decoding": {"temperature": 1.0}}


def test_a_group_that_was_cut_off_is_drawn_again(tmp_path: Path):
    store = SampleStore(tmp_path)
    with store.writer(Shard()) as writer:
        writer.write([sample("a", 0), sample("a", 1)])
        writer.write([sample("b", 0), sample("b", 1)])
    file = tmp_path / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-25])  # the process ended while writing
    wanted = [Unit("plain", 0, p, 0, 2) for p in "abc"]
    assert [u.problem for u in store.missing(wanted)] == ["b", "c"]
    with store.writer(Shard()) as writer:
        assert len(file.read_text().splitlines()) == 2
        writer.write([sample("b", 0), sample("b", 1)])
    assert [u.problem for u in store.missing(wanted)] == ["c"]
    assert [(s.problem, s.sample) for s in store.samples()] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_damage_in_the_middle_is_said(tmp_path: Path):
    store = SampleStore(tmp_path)
    with store.writer(Shard()) as writer:
        writer.write([sample("a", 0)])
    file = tmp_path / "samples.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not a sample"):
        store.samples()


def test_samples_of_another_model_or_sampling_are_not_mixed(tmp_path: Path):
    store = SampleStore(tmp_path)
    store.claim(IDENTITY)
    store.claim(IDENTITY)
    with pytest.raises(UserError, match=r"decoding\.temperature: 1\.0 there, 0\.6 now\): they are not mixed"):
        store.claim({**IDENTITY, "decoding": {"temperature": 0.6}})
    with pytest.raises(UserError, match=r"weights: 'w' there, 'v' now"):
        store.claim({**IDENTITY, "weights": "v"})
    store.claim({**IDENTITY, "erasure": {"kappa0": 1.0}})  # erasable samples may join plain ones …
    with pytest.raises(UserError, match=r"erasure\.kappa0: 1\.0 there, 2\.0 now"):
        store.claim({**IDENTITY, "erasure": {"kappa0": 2.0}})
    store.claim(IDENTITY)  # … and plain figures may be asked for again


def test_samples_without_an_owner_are_left_alone(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds samples and no identity\.json"):
        SampleStore(tmp_path).claim(IDENTITY)


def test_one_writer_at_a_time(tmp_path: Path):
    store = SampleStore(tmp_path)
    with store.writer(Shard()), pytest.raises(UserError, match="another evaluation is writing"), store.writer(Shard()):
        pass
    with store.writer(Shard(1, 2)), store.writer(Shard(2, 2)):
        pass


def test_shards_divide_the_problems():
    problems = [f"p{i}" for i in range(5)]
    units = [Unit(m, 0, p, 0, 2) for m in ("plain", "erasable") for p in problems]
    parts = [Shard(i, 2).take(units, problems) for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(units)
    assert {u.problem for u in parts[0]} == {"p0", "p2", "p4"}
    for text in ("0/2", "3/2", "1", "a/b", "1/"):
        with pytest.raises(UserError, match="write I/N"):
            Shard.parse(text)


def test_many_samples_are_drawn_in_rounds():
    assert even_sizes(10, 4) == [4, 3, 3]
    assert even_sizes(4, 4) == [4]
    plan = SamplingPlan(
        ("a",), load_config(None, [], ["eval.num_samples=10", "rollout.num_generations=4"]), erase=False
    )
    assert [(u.round, u.first, u.size) for u in plan.wanted()] == [(0, 0, 4), (1, 4, 3), (2, 7, 3)]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ([], [8, 8, 8, 8]),
        (["eval.num_samples=4"], [4]),
        (["rollout.cache_rows=6"], [6, 6, 5, 5, 5, 5]),
        (["rollout.max_rows=2"], [4] * 8),
        (["rollout.num_generations=2", "eval.num_samples=5"], [3, 2]),  # none alone: it would have no threshold
        (["rollout.num_generations=1"], [32]),  # training judges by saved statistics: all samples are the group
        (["rollout.num_generations=3", "erasure.min_siblings=4"], [32]),
        (["rollout.kv_budget=1"], [8, 8, 8, 8]),  # the machine's memory changes no group
    ],
)
def test_a_round_is_as_large_as_a_group_in_training(settings: list[str], sizes: list[int]):
    config = load_config(None, [], ["eval.num_samples=32", "rollout.num_generations=8", *settings])
    assert round_sizes(config) == sizes


@pytest.mark.parametrize(
    "override",
    [
        *(
            "run.seed=1",
            "model.dtype=bfloat16",
            "rollout.max_rows=2",
            "rollout.segment_length=3",
            "rollout.max_segments=2",
        ),
        *(
            "rollout.max_completion_length=9",
            "eval.num_samples=9",
            "eval.temperature=0.5",
            "eval.top_p=0.5",
            "eval.top_k=3",
        ),
    ],
)
def test_whatever_changes_a_plain_sample_makes_another_evaluation(override: str):
    assert decoding(load_config(None, (), [override])) != decoding(load_config())
    assert decoding(load_config(None, (), ["rollout.temperature=0.5", "erasure.eta=1.0"])) == decoding(load_config())


def test_samples_of_another_boundary_are_not_taken_over() -> None:
    surprise = ["rollout.boundary=surprise", "rollout.boundary_level=0.8"]
    others = (["rollout.boundary=entropy", surprise[1]], [surprise[0], "rollout.boundary_level=0.9"], [])
    for other in (*others, [*surprise, "rollout.min_segment_length=4"]):
        assert settings_digest(load_config(None, (), other)) != settings_digest(load_config(None, (), surprise))


def test_more_plain_samples_where_erasing_cost_more():
    plan = SamplingPlan(("a",), load_config(None, [], ["eval.num_samples=2"]), erase=True)
    plain = [[sample("a", 0), sample("a", 1)]]
    dear = [[sample("a", i, mode="erasable", generated=19) for i in range(2)]]
    assert plan.more_plain({"plain": plain, "erasable": dear}) == [Unit("plain", 1, "a", 2, 2)]
    assert plan.more_plain({"plain": plain, "erasable": plain}) == []


def directory(path: Path, right: int, *, answers: str = "x", mode: str = "plain") -> Path:
    store = SampleStore(path)
    store.claim({**IDENTITY, "data": {**IDENTITY["data"], "answers": answers}})  # type: ignore[dict-item]
    with store.writer(Shard()) as writer:
        for problem in "abcd":
            writer.write([sample(problem, i, mode=mode, correct=i < right) for i in range(4)])
    return path


def test_two_evaluations_compared(tmp_path: Path):
    found = compare(directory(tmp_path / "a", 3), directory(tmp_path / "b", 1))
    assert list(found) == ["Avg", "Pass@2", "Maj@2", "Pass@4", "Maj@4"]
    assert (found["Avg"].a, found["Avg"].b, found["Avg"].difference.mean) == (0.75, 0.25, 0.5)
    assert found["Avg"].difference.p == 2 / 2**4
    assert found["Pass@4"].difference.p == 1.0


def test_as_many_samples_of_each_problem_are_compared(tmp_path: Path):
    """An equal budget may have bought one problem more: they are left out."""
    a, b = directory(tmp_path / "a", 3), directory(tmp_path / "b", 1)
    with SampleStore(a).writer(Shard()) as writer:
        writer.write([sample("a", i, round=1, correct=False) for i in (4, 5)])
    found = compare(a, b)
    assert (found["Avg"].a, found["Avg"].difference.mean) == (0.75, 0.5)
    assert list(found)[-1] == "Maj@4"


def test_what_can_not_be_compared(tmp_path: Path):
    a, other = directory(tmp_path / "a", 3), directory(tmp_path / "c", 3, answers="y")
    with pytest.raises(UserError, match="evaluations on different problems"):
        compare(a, other)
    with pytest.raises(UserError, match=r"holds no erasable samples \(e3rl eval … --erase makes them\)"):
        compare(a, a, ("plain", "erasable"))
    with pytest.raises(UserError, match="there is no directory"):
        compare(a, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no evaluation"):
        compare(a, tmp_path / "empty")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("environments.max_turns=2", "decoding.environments.max_turns: 8 there, 2 now"),
        ("environments.erase=errors", "erasure.environments.erase: 'none' there, 'errors' now"),
        ("environments.max_turn_erasures=3", "erasure.environments.max_turn_erasures: 1 there, 3 now"),
    ],
)
def test_samples_with_other_turns_are_not_mixed(tmp_path: Path, changed: str, said: str):
    tools = load_config(None, [], ["environments.factory=books"])
    other = load_config(None, [], ["environments.factory=books", changed])
    plain = load_config(None, [], [changed])
    store = SampleStore(tmp_path / "samples")
    store.claim(identity(torch.nn.Linear(1, 1), "s", [], tools, erase=True, calibration=None))
    with pytest.raises(UserError, match=said):
        store.claim(identity(torch.nn.Linear(1, 1), "s", [], other, erase=True, calibration=None))
    assert settings_digest(other) != settings_digest(tools)
    assert settings_digest(plain) == settings_digest(load_config(None, [], [])), "without tools it means nothing"


def test_samples_of_a_version_with_fewer_settings_go_on(tmp_path: Path):
    config = load_config(None, [], [])
    whole = identity(torch.nn.Linear(1, 1), "s", [], config, erase=True, calibration=None)
    older = {**whole, "erasure": {k: v for k, v in whole["erasure"].items() if k != "kappa1"}}
    store = SampleStore(tmp_path / "samples")
    store.claim(older)
    store.claim(whole)
    with pytest.raises(UserError, match=r"erasure\.kappa1: 0\.0 there, 0\.5 now"):
        store.claim({**whole, "erasure": {**whole["erasure"], "kappa1": 0.5}})
