"""Several sources by weight: every step has their shares, each source its own order, and a position leads back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.cli import main
from e3rl.config import build_config, load_config
from e3rl.data.loading import held_out_sources, training_problems
from e3rl.data.stream import MixedStream, PromptStream, build_stream
from e3rl.errors import UserError
from e3rl.train.run_directory import changed_settings, read_lines
from e3rl.train.trainer import Trainer
from e3rl.types import Problem, Prompt
from tests.train.random_lab import lab_config


def prompts(source: str, count: int) -> list[Prompt]:
    return [Prompt(Problem(f"{source}/{i}", "x"), (i,)) for i in range(count)]


def mixed(shares: dict[str, float], sizes: dict[str, int]) -> MixedStream:
    return MixedStream({name: prompts(name, size) for name, size in sizes.items()}, shares, seed=5)


def sources_of(taken: list[Prompt]) -> Counter[str]:
    return Counter(p.problem.id.partition("/")[0] for p in taken)


def test_every_step_has_the_shares_to_within_a_prompt():
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    stream = mixed(shares, {"a": 50, "b": 50, "c": 50})
    so_far: Counter[str] = Counter()
    for step in range(1, 30):
        taken = stream.take(4)
        assert len({p.problem.id for p in taken}) == 4
        so_far += sources_of(taken)
        for name, share in shares.items():
            assert abs(so_far[name] - 4 * step * share) < 1, (step, name)


def test_a_source_is_gone_through_before_it_begins_again():
    stream = mixed({"a": 0.5, "b": 0.5}, {"a": 3, "b": 40})
    taken = [p.problem.id for _ in range(6) for p in stream.take(2) if p.problem.id.startswith("a")]
    assert sorted(taken[:3]) == sorted(taken[3:]) == ["a/0", "a/1", "a/2"]
    alone = PromptStream(prompts("a", 3), seed=5)
    assert taken == [p.problem.id for _ in range(6) for p in alone.take(1)]
    assert stream.epochs == pytest.approx(12 / 43)


def test_a_position_leads_back():
    stream = mixed({"a": 0.7, "b": 0.3}, {"a": 7, "b": 5})
    for _ in range(3):
        stream.take(3)
    state = json.loads(json.dumps(stream.state()))
    expected = [p.problem.id for _ in range(5) for p in stream.take(3)]
    other = mixed({"a": 0.7, "b": 0.3}, {"a": 7, "b": 5})
    other.restore(state)
    assert [p.problem.id for _ in range(5) for p in other.take(3)] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["sources"].pop("b") and s["taken"].pop("b"), "the run was on other sources: a"),
        (lambda s: s.pop("sources"), "the saved data position is damaged"),
        (lambda s: s["taken"].update(a=-1), "damaged: a = -1"),
        (lambda s: s["sources"]["a"].update(fingerprint="x"), "the training data changed"),
    ],
)
def test_a_position_of_something_else_is_refused(change, words: str):
    stream = mixed({"a": 0.5, "b": 0.5}, {"a": 4, "b": 4})
    state = json.loads(json.dumps(stream.state()))
    change(state)
    with pytest.raises(UserError, match=words):
        stream.restore(state)


def test_sources_are_read_and_their_ids_told_apart(tmp_path: Path):
    for name in ("a", "b"):
        rows = [{"prompt": f"{i}+1:", "answer": str(i + 1)} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    data = build_config({"data": {"mixture": {a: 3, b: 1}}}).data
    assert data.sources == {a: 0.75, b: 0.25}
    found = training_problems(data)
    assert [p.id for p in found[a]] == [f"{a}/0", f"{a}/1"]
    assert len({p.id for problems in found.values() for p in problems}) == 4
    alone = training_problems(build_config({"data": {"train": a}}).data)
    assert [p.id for p in alone[a]] == ["0", "1"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mixture": {"a.jsonl": 0}}, r"weight of 'a\.jsonl' is 0; it must be a number above 0"),
        ({"mixture": {"a.jsonl": "much"}}, "is 'much'"),
        ({"mixture": {"a.jsonl": True}}, "is True"),
        ({"mixture": {"a.jsonl": float("inf")}}, "is inf"),
        ({"mixture": {"a.jsonl": 1}, "train": "b.jsonl"}, "both set"),
        ({"mixture": ["a.jsonl"]}, r"data\.mixture: expected a table"),
    ],
)
def test_mixtures_that_are_none(data: dict, words: str):
    with pytest.raises(UserError, match=words):
        build_config({"data": data})


def test_one_source_has_the_order_that_it_always_had():
    ours = build_stream({"a": prompts("a", 9)}, {"a": 1.0}, 3)
    assert isinstance(ours, PromptStream)
    with pytest.raises(UserError, match="a step of 5 different prompts can't be made of 4"):
        mixed({"a": 1.0, "b": 1e-9}, {"a": 4, "b": 4}).take(5)


def test_a_run_on_a_mixture_goes_on_where_it_stopped(tmp_path: Path):
    """Metrics, ledger and weights of a run that was stopped and taken up again are those of one that was not."""
    mixture = ("data.train=", 'data.mixture={"lab:chain:1"=3, "lab:path:2"=1}', "train.prompts_per_step=4")

    def records(*overrides: str, resume: bool = False) -> list[dict]:
        trainer = Trainer(lab_config(tmp_path, *mixture, "train.save_steps=1", *overrides), resume=resume)
        trainer.train()
        rows = [
            pq.read_table(p, columns=["problem_id"]).to_pylist() for p in sorted(trainer.run_path.glob("rollouts/*"))
        ]
        ids = [{r["problem_id"] for r in step} for step in rows]
        assert all(sum(i.startswith("lab:chain:1/") for i in step) == 3 and len(step) == 4 for step in ids)
        clock = ("seconds", "tokens_per", "memory")
        lines = read_lines(trainer.run_path / "metrics.jsonl")
        return [{k: v for k, v in r.items() if not k.startswith(clock)} | {"ids": ids[n]} for n, r in enumerate(lines)]

    whole = records("run.name=whole", "train.steps=3")
    assert [r["epoch"] for r in whole] == [4 * step / 16 for step in (1, 2, 3)]
    records("run.name=cut", "train.steps=1")
    (tmp_path / "cut" / "summary.json").unlink()
    assert records("run.name=cut", "train.steps=3", resume=True) == whole


def test_what_is_held_out_is_what_data_eval_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An empty list is nothing, beside a mixture too; by default, and as 'auto', it is the other half of lab families."""
    mixture = "data.mixture={'lab:arith:1' = 1, 'lab:chain:1' = 3}"
    halves = ("lab:arith:1", "lab:chain:1")
    expected = {"[]": (), "auto": halves, "['lab:path:1', 'auto', 'lab:chain:1']": ("lab:path:1", *halves)}
    for value, sources in expected.items():
        assert held_out_sources(load_config(None, [], [mixture, f"data.eval={value}"]).data) == sources
        assert main(["data", "demo", mixture, "data.train=''", f"data.eval={value}", "--show", "0"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert tuple(line[15:] for line in said if line.startswith("held-out data: ")) == sources
    unset = load_config(None, [], [mixture])
    assert held_out_sources(unset.data) == halves
    assert held_out_sources(load_config(None, [], ["data.train=own.jsonl"]).data) == ()
    none = load_config(None, [], [mixture, "data.eval=[]"])
    assert changed_settings(none, unset) == []  # a run from before 'auto' was named
    assert changed_settings(unset, none) == ["data.eval (('auto',) then, () now)"]
