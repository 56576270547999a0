"""A whole run with an environment: what is learnt from, what the ledger keeps, what the metrics say."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from e3rl.config import load_config
from e3rl.lab.pretrain import build_model
from e3rl.objectives import OBJECTIVES
from e3rl.train.ledger import ledger_path
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from tests.environments.worlds import STATEFUL, tokenizer

RECIPE = """
[data]
train = "{data}"
[environments]
factory = "{environment}:Counter"
erase = "errors"
[rollout]
engine = "tests.environments.worlds:PluginEngine"
num_generations = 2
segment_length = 24
max_segments = 20
[erasure]
baseline = "static"
static_baseline = 1.0
max_erasures = 2
[objective]
name = "{objective}"
[rewards]
functions = ["environment"]
[train]
steps = 1
prompts_per_step = 1
eval_steps = 0
"""


def write_run(tmp_path: Path, objective: str, source: str = STATEFUL) -> Path:
    """A model, an environment, a row and a recipe; the recipe's path."""
    tokens = tokenizer()
    torch.manual_seed(0)
    model = build_model(tokens)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    (tmp_path / "counter.py").write_text(source)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "p", "prompt": "Count.", "start": 3, "answer": "5"}) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        RECIPE.format(data=tmp_path / "rows.jsonl", environment=tmp_path / "counter.py", objective=objective)
    )
    return recipe


def trained(tmp_path: Path, objective: str) -> tuple[Path, Trainer]:
    recipe = write_run(tmp_path, objective)
    config = load_config(recipe, [], [f"run.output_dir={tmp_path}", f"model.path={tmp_path / 'model'}"])
    trainer = Trainer(config)
    trainer.train()
    return trainer.run_path, trainer


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"sft"}))  # which learns from texts, not from rollouts
def test_a_run_with_tools(tmp_path: Path, objective: str):
    path, _ = trained(tmp_path, objective)
    [line] = read_lines(path / "metrics.jsonl")
    assert (line["turns"], line["calls"], line["erased_turns"], line["environment_failures"]) == (2, 1, 1, 0)
    assert line["call_errors"] == pytest.approx(1 / 3)
    assert 0 < line["seconds_tools"] < 1
    assert (line["reward"], line["reward_missing"]) == (5.5, 0)
    assert line["committed_tokens"] == 2 * (
        len('<tool_call>\n{"name": "add", "arguments": {"by": 2}}\n</tool_call>') + 1 + 6
    )
    rows = pq.read_table(ledger_path(path, 1)).to_pylist()
    seen = [[json.loads(s["observation"]) if s["observation"] else None for s in row["segments"]] for row in rows]
    results = [[c["result"] for o in row if o for c in o["calls"]] for row in seen]
    assert results == [["5"], ["6"]]
    [erased] = [e for row in rows for e in row["erasures"]]
    told = json.loads(erased["observation"])
    assert (told["calls"][0]["result"], told["state"], "10" in erased["text"]) == ("{'error': 'too many'}", 0, True)
    learns = objective not in {"vanilla", "disco"}  # nothing; from right and wrong ones, and here both are right
    assert [any(row["advantages"]) for row in rows] == [learns, learns]
    for row in rows:
        drawn = [s["observation"] is None for s in row["segments"] for _ in s["ids"]]
        assert len(row["advantages"]) == len(drawn)
        assert all(a == 0 for a, own in zip(row["advantages"], drawn, strict=True) if not own)
