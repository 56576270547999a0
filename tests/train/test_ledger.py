"""The ledger of a run whose erased candidates are learnt from, and whose reward function kills its worker once."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e3rl.doctor.run import _ledger_problem
from e3rl.report.rollouts import read_step
from e3rl.train.ledger import SCHEMA, ledger_path, ledger_rows, write_ledger
from e3rl.train.packing import group_sequences
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.report.builder import Words, lesson, rewarded_group, run_config, write_rollouts
from tests.train.random_lab import lab_config

REWARD = '''
import os
from pathlib import Path


def reward(completion_ids, **_):
    """1 where the ids add up to an odd number; the ninth call, in training, ends its worker's life."""
    calls = Path(__file__).with_name("calls")
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    calls.write_text(str(count))
    if count == 9:
        os._exit(3)
    return [float(sum(ids) % 2) for ids in completion_ids]
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("contrast")
    (directory / "dying.py").write_text(REWARD)
    config = lab_config(
        directory,
        f'rewards.functions=["{directory}/dying.py:reward"]',
        "rewards.isolate=true",
        "objective.erased=contrast",
        "objective.contrast_weight=0.5",
        "erasure.kappa0=0",
        "rollout.num_generations=4",
    )
    trainer = Trainer(config)
    trainer.train()
    return trainer.run_path


def test_an_erased_candidates_advantage_stands_beside_it(run: Path) -> None:
    rows = [r for p in sorted((run / "rollouts").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    for row in rows:
        assert row["erased_advantages"] == [-0.5 if row["reward"] > 0 else 0.0] * len(row["erasures"])
    assert {a for row in rows for a in row["erased_advantages"]} == {-0.5, 0.0}


def test_every_column_holds_what_it_says(tmp_path: Path) -> None:
    config = run_config(tmp_path / "a")
    groups = [rewarded_group(random.Random(n), Words(), f"p{n}", config, 0.5) for n in range(3)]
    sequences = group_sequences([g.group for g in groups], with_erased=True)
    lessons = [lesson(s, [0.5] if s.erased else range(len(s.response_ids))) for s in sequences]
    write_ledger(tmp_path, 7, ledger_rows(7, groups, lessons, Words()))
    table = pq.read_table(ledger_path(tmp_path, 7))
    assert (table.schema.names, table.schema.metadata) == (SCHEMA.names, {b"format": b"3"})
    assert all(field.metadata[b"meaning"] for field in table.schema)
    rows, words = iter(table.to_pylist()), Words()
    for item in groups:
        for t, reward in zip(item.group.trajectories, item.rewards, strict=True):
            row = next(rows)
            assert (row["step"], row["problem_id"], row["sibling"]) == (7, t.prompt.problem.id, t.sibling)
            assert (row["prompt"], row["answer"]) == ("12+35-4=", "43")
            assert row["response"] == words.decode(t.ids.tolist()) == "".join(s["text"] for s in row["segments"])
            assert (row["reward"], dict(row["reward_parts"]), row["reward_error"]) == (
                reward.value,
                reward.parts,
                reward.error,
            )
            assert row["advantages"] == list(range(t.committed_tokens))
            assert (row["shares"], row["erased_advantages"]) == (None, [0.5] * len(t.erasures))
            for kept, found in zip([*t.segments, *t.erasures], [*row["segments"], *row["erasures"]], strict=True):
                assert found["pieces"] == [words.words[i] for i in kept.candidate.ids]
                assert found["text"] == "".join(found["pieces"])
                assert found["perturbations"] == kept.candidate.perturbations.tolist()
                assert (found["uncertainty"], found["threshold"]) == (
                    (kept.judgement.uncertainty.total, kept.judgement.threshold.total)
                    if kept.judgement
                    else (None, None)
                )
    assert next(rows, None) is None


@pytest.mark.parametrize(
    ("number", "absent"), [("1", ("kept_mass", "ended", "smoothed", "observation")), ("2", ("observation",))]
)
def test_a_ledger_of_a_format_before_is_shown_as_ever(tmp_path: Path, number: str, absent: tuple[str, ...]) -> None:
    """Format 1 has no token ids of the prompt, and of candidates no kept mass, no smoothed entropy and no `ended`; 2 no tools."""
    config = run_config(tmp_path / "a")
    write_rollouts(tmp_path, 1, [rewarded_group(random.Random(1), Words(), "p", config, 0.5)], Words())
    path = ledger_path(tmp_path, 1)
    expected = read_step(path, 10**6)
    fields = [f for f in SCHEMA if f.name not in ("prompt_ids", "segments", "erasures")]
    old = [f for f in SCHEMA.field("segments").type.value_type if f.name not in absent]
    fields += [pa.field(name, pa.list_(pa.struct(old))) for name in ("segments", "erasures")]
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata={"format": number})), path)
    assert absent[0] not in str(pq.read_schema(path))
    assert read_step(path, 10**6) == expected
    assert _ledger_problem(path) is None


def test_a_reward_worker_that_died_is_counted_in_its_step(run: Path) -> None:
    assert sum(r["reward_restarts"] for r in read_lines(run / "metrics.jsonl")) == 1
