"""What a finished run leaves: its files, its ledger, its calibration statistics and its model."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from e3rl.train.ledger import SCHEMA
from e3rl.train.metrics import METRICS
from e3rl.train.run_directory import read_lines


def test_a_run_leaves_what_it_promises(finished: Path):
    assert {p.name for p in finished.iterdir()} == {
        "config.toml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "rollouts", "checkpoints", "model",
        "summary.json",
    }  # fmt: skip
    metrics = read_lines(finished / "metrics.jsonl")
    assert [r["step"] for r in metrics] == [1, 2, 3, 4]
    explained = set(METRICS)
    for record in metrics:
        assert {k.partition("/")[0] for k in record} <= explained
        assert 0 <= record["accuracy"] <= 1
        assert record["mismatch_max"] < 1e-3
        assert record["tokens"] == record["committed_tokens"] + record["erased_tokens"]
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["before"]) == set(summary["after"]) == {"plain", "erasable"}
    assert {"avg@2", "pass@2", "ci95"} <= set(summary["before"]["plain"])
    assert summary["tokens_generated"] == sum(r["tokens"] for r in metrics)
    assert summary["r"] == sum(r["erased_tokens"] for r in metrics) / sum(r["committed_tokens"] for r in metrics)


def test_the_ledger_holds_every_trajectory_and_agrees_with_the_metrics(finished: Path):
    for record in read_lines(finished / "metrics.jsonl"):
        table = pq.read_table(finished / "rollouts" / f"step-{record['step']:06d}.parquet")
        assert table.schema.equals(SCHEMA)
        rows = table.to_pylist()
        assert len(rows) == 12
        assert sum(len(s["ids"]) for r in rows for s in r["segments"]) == record["committed_tokens"]
        assert sum(len(e["ids"]) for r in rows for e in r["erasures"]) == record["erased_tokens"]
        assert sum(r["reward"] for r in rows) / 12 == pytest.approx(record["reward"])
        for row in rows:
            assert "".join(s["text"] for s in row["segments"]) == row["response"]
            assert len(row["advantages"]) == sum(len(s["ids"]) for s in row["segments"])
            assert sum(row["shares"]) == pytest.approx(1, abs=1e-4)
            for erased in row["erasures"]:
                assert erased["uncertainty"] > erased["threshold"]


def test_d3_a_step_is_judged_by_the_token_entropies_of_the_step_before(finished: Path):
    """Eq 13. mu_E and sigma_E are those of the first candidates and committed segments of the previous batch."""
    before, after = (pq.read_table(finished / "rollouts" / f"step-00000{n}.parquet").to_pylist() for n in (1, 2))
    assert sum(len(row["erasures"]) for row in before) > 0
    entropies = [
        h
        for row in before
        for c in (*row["segments"], *(e for e in row["erasures"] if e["attempt"] == 0))
        for h in c["entropies"]
    ]
    mean, std = statistics.fmean(entropies), statistics.pstdev(entropies)
    judged = [c for row in after for c in (*row["segments"], *row["erasures"])]
    expected = [0.1 / (1 + math.exp(-(max(c["entropies"]) - mean) / (std + 1e-6))) for c in judged]
    assert [c["extremum"] for c in judged] == pytest.approx(expected, abs=1e-6)


def test_reference_statistics_are_of_all_first_candidates_of_the_run(finished: Path):
    rows = [
        row for path in sorted((finished / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    by_index: dict[int, list[float]] = {}
    for c in (c for row in rows for c in (*row["segments"], *row["erasures"]) if c["attempt"] == 0):
        by_index.setdefault(c["index"], []).append(c["uncertainty"])
    found = json.loads((finished / "model" / "e3rl_reference.json").read_text())["segments"]
    assert [s["count"] for s in found] == [len(by_index[n]) for n in range(len(by_index))]
    assert [s["mean"] for s in found] == pytest.approx([statistics.fmean(by_index[n]) for n in range(len(by_index))])


def test_the_model_is_an_ordinary_directory(finished: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1:"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    card = (finished / "model" / "README.md").read_text()
    assert "E³RL" in card
    assert "| before | plain |" in card
