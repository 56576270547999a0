"""Code that a script changes its dataset's rows with: carried over, it makes the rows that the script makes, or it is listed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from e3rl.cli import main
from e3rl.config import load_config
from e3rl.data.loading import load_problems
from e3rl.integrations.trl_recipe import translate
from e3rl.integrations.trl_scripts import read_script

ROWS = [
    {"question": f"{n}+{n + 1}:", "solution": f"so #### {2 * n + 1}", "level": n % 3, "id": f"r{n}"} for n in range(9)
]
START = """
import functools
import re as regex
from datasets import load_dataset
MARK = "####"
PROMPT = f"Compute. {MARK}"
def after(text, mark=MARK):
    return text.split(mark)[-1].strip()
class Style:
    NAME = "short"
def chat(row):
    return {"prompt": [{"role": "system", "content": PROMPT}, {"role": "user", "content": row["question"]}]}
def in_place(row):
    row["prompt"] = regex.sub(":", " =", row["question"])
    row["answer"] = after(row["solution"])
    return row
def even(n):
    return n == 0 or odd(n - 1)
def odd(n):
    return n != 0 and even(n - 1)
def made(split):
    def process(row, suffix=""):
        return {"prompt": split + row["question"] + suffix}
    return process
"""


def rows_of_the_script(script: str) -> list[dict[str, Any]]:
    """What the script itself gives its trainer."""
    found: list[Any] = []
    names = {"GRPOTrainer": lambda *_, train_dataset, **__: found.append(train_dataset), "__name__": "__main__"}
    exec(compile(script, "script.py", "exec"), names)
    return [dict(row) for row in found[0]]


@pytest.mark.parametrize(
    "change",
    [
        "data = data.map(chat)",
        "data = data.map(in_place)",
        "data = data.map(in_place, remove_columns=['question', 'level'], num_proc=None, desc='x')",
        "data = data.map(in_place, remove_columns=data.column_names)",
        "data = data.filter(lambda row: even(row['level'])).map(chat)",
        "data = data.rename_column('question', 'q').map(lambda row: {'prompt': row['q'] + Style.NAME})",
        "data = data.map(lambda r: {'prompt': r['question']}).rename_columns({'prompt': 'level', 'level': 'prompt'})\n"
        "data = data.remove_columns('prompt').rename_column('level', 'prompt')",
        "data = data.map(made('train: '), fn_kwargs={'suffix': '!'}).select_columns(['prompt', 'solution', 'id'])",
        "data = data.map(functools.partial(made('train: '), suffix='?')).shuffle(seed=1)",
        "data = data.filter(lambda r: r['level'] > 0, num_proc=None).map(chat).select(range(3))",
        "data = data.map(lambda row: row | {'prompt': row['question']}, remove_columns=['question'])",
        "data = data.map(lambda row: {'prompt': row.pop('question')})",
        "data = data.map(print).map(lambda row: {**row, 'prompt': row['question']}, remove_columns=['question'])",
        "data = data.map(chat, batched=False, with_indices=False).flatten_indices()",
        "LIMIT = 2\ndef build(split):\n    keep = LIMIT - 1\n    def wanted(row):\n        return row['level'] >= keep\n"
        "    return load_dataset('json', data_files='rows.jsonl', split=split).filter(wanted).map(chat)\ndata = build('train')",
    ],
)
def test_rows_are_those_of_the_script(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    loads = "data = load_dataset('json', data_files='rows.jsonl', split='train')"
    script = f"{START}\n{loads}\n{change}\nGRPOTrainer('m', 'accuracy_reward', train_dataset=data)\n"
    Path("script.py").write_text(script)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert main(["convert", "trl", "script.py", "--output", "my.toml"]) == 0
    config = load_config(Path("my.toml")).data
    assert config.transform == "my_rows.py:transform_row"
    found = load_problems("rows.jsonl", config=config, split="train")
    expected = rows_of_the_script(script)
    if "shuffle" in change:
        expected.sort(key=lambda row: str(row["id"]))
    prompts = [
        p.prompt if isinstance(p.prompt, str) else [{"role": m.role, "content": m.content} for m in p.prompt]
        for p in found
    ]
    assert prompts == [row["prompt"] for row in expected]
    assert [p.columns for p in found] == [
        {k: v for k, v in row.items() if k not in ("prompt", "id", "answer")} for row in expected
    ]
    assert [p.answer for p in found] == [row.get("answer") for row in expected]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("data.map(lambda batch: batch, batched=True)", "not one of a row alone (batched = True)"),
        ("data.map(lambda row, n: row, with_indices=True)", "not one of a row alone (with_indices"),
        ("data.map(lambda row: {'prompt': args.prefix})", "reads from its command line"),
        ("data.map(lambda row: {'prompt': twice})", "'twice'"),
        ("data.map(lambda row: {'prompt': nowhere})", "'nowhere'"),
        ("data.map(counted)", "changes the variable 'count'"),
        ("data.map(seen)", "'memory'"),
        ("data.map(lambda row: {'prompt': dice.choice('ab')})", "'dice'"),
        ("data.map(lambda row: {'prompt': settings.prefix})", "'settings'"),
        ("data.map(lambda row: {'prompt': grown})", "'grown'"),
        ("data.map(chat, remove_columns=[c for c in data.column_names if c != 'id'])", "the columns that it removes"),
        ("data.map(chat, fn_kwargs={'n': len(data)})", "its arguments can't be told"),
        ("data.select(range(3)).filter(lambda row: True)", "after the first rows were chosen"),
        ("data.sort('level')", "can't be told without running it"),
        ("data.train_test_split(0.1)['train']", "can't be told without running it"),
    ],
)
def test_what_can_not_be_told_from_the_text_is_listed_and_no_half_of_it_is_carried(
    change: str, why: str, tmp_path: Path
):
    script = f"""{START}
import argparse
import random as dice
from trl import TrlParser
settings, other = TrlParser((A, B)).parse_args_and_config()
parser = argparse.ArgumentParser()
parser.add_argument("--prefix")
args = parser.parse_args()
dice.seed(0)
twice = "a"
if other.big:
    twice = "b"
grown = "a"
grown += "b"
count, memory = 0, []
def counted(row):
    global count
    count += 1
    return {{"prompt": str(count)}}
def seen(row):
    memory.append(row)
    return {{"prompt": str(len(memory))}}
data = load_dataset("json", data_files="rows.jsonl", split="train").map(chat)
GRPOTrainer("m", "accuracy_reward", train_dataset={change})
"""
    found = translate(read_script(script, tmp_path / "x.py"), rows_file=tmp_path / "rows.py")
    assert found.rows == ""
    assert "transform" not in found.tables["data"]
    [loss] = [loss for loss in found.losses if why in loss]
    assert loss.startswith("dataset.")
    assert "data.train" in loss
    assert any(loss.startswith("dataset.map") for loss in found.losses)


def test_converting_runs_nothing_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("x.py").write_text(
        "import os\ndata = load_dataset('a/b').map(os.mkdir('ran') or (lambda row: row))\nos.mkdir('ran')\n"
        "def f(row, d=open('ran', 'w')):\n    return row\nGRPOTrainer('m', train_dataset=data.map(f))"
    )
    assert main(["convert", "trl", "x.py", "--output", "my.toml"]) == 0
    assert sorted(os.listdir()) == ["my.toml", "x.py"]


def test_first_rows_of_a_shuffled_dataset_are_said_to_be_others():
    script = "GRPOTrainer('m', train_dataset=load_dataset('a/b').shuffle(seed=1).select(range(3)))"
    found = translate(read_script(script, Path("x.py")))
    assert found.tables["data"]["train_limit"] == 3
    assert found.losses[0].startswith(
        "the first 3 of shuffled rows: line 1: data.train_limit takes the first as they stand"
    )


def test_held_out_rows_that_are_made_otherwise_are_said():
    script = (
        "data = load_dataset('a/b')\ntrain = data['train'].map(lambda row: {'prompt': row['q']})\n"
        "GRPOTrainer('m', train_dataset=train, eval_dataset=data['test']CHANGED.select(range(7)))"
    )
    losses = {}
    for changed in ("", ".map(lambda row: {'prompt': row['q']})"):
        found = translate(read_script(script.replace("CHANGED", changed), Path("x.py")), rows_file=Path("r.py"))
        assert "train_limit" not in found.tables["data"]
        losses[changed] = [loss.partition(":")[0] for loss in found.losses]
    limit, rewards = "the first 7 rows of eval_dataset", "reward_funcs"
    assert losses == {"": [limit, "eval_dataset", rewards], ".map(lambda row: {'prompt': row['q']})": [limit, rewards]}
