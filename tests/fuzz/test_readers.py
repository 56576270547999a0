"""Whatever stands in a file that somebody gives us, it is read or refused with a sentence."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import DataConfig, build_config, load_config, parse_override, to_toml
from e3rl.data.loading import load_problems
from e3rl.doctor.run import check_run
from e3rl.errors import UserError
from e3rl.parsing import read_tables
from e3rl.report.page import describe_run
from e3rl.train.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from e3rl.train.journal import StepJournal
from e3rl.train.run_directory import read_config, read_lines
from tests.fuzz.cases import fuzzed, long
from tests.report.builder import SyntheticRun

SECTIONS = ("run", "model", "data", "rollout", "erasure", "filter", "objective", "rewards", "train", "eval", "x")
FIELDS = (
    "name",
    "seed",
    "path",
    "lora_r",
    "train",
    "top_p",
    "max_rows",
    "kappa0",
    "functions",
    "weights",
    "steps",
    "dtype",
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _or_sentence(action: Any) -> Any:
    """The action's value, or None where it was refused with a sentence."""
    try:
        return action()
    except UserError:
        return None


@long
@given(st.dictionaries(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from(FIELDS), PLAIN, max_size=4) | PLAIN))
@fuzzed
def test_any_tables_are_a_config_or_a_sentence(tables: dict[str, Any]):
    config = _or_sentence(lambda: build_config(tables))
    if config is not None and not config.objective.options:
        assert build_config(json.loads(json.dumps({}))) is not None
        assert to_toml(config)


@long
@given(
    st.text(string.printable, max_size=60)
    | st.builds(
        lambda s, f, v: f"{s}.{f}={v}", st.sampled_from(SECTIONS), st.sampled_from(FIELDS), st.text(max_size=12)
    )
)
@fuzzed
def test_any_override_is_a_setting_or_a_sentence(text: str):
    _or_sentence(lambda: parse_override(text))
    _or_sentence(lambda: load_config(None, [], [text]))


@long
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
@fuzzed
def test_any_bytes_are_a_recipe_or_a_sentence(tmp_path: Path, content: bytes):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    _or_sentence(lambda: load_config(path))
    _or_sentence(lambda: read_tables(path))
    (tmp_path / "recipe.yaml").write_bytes(content)
    _or_sentence(lambda: load_config(tmp_path / "recipe.yaml"))
    (tmp_path / "config.toml").write_bytes(content)
    _or_sentence(lambda: read_config(tmp_path))


ROWS = st.lists(
    st.dictionaries(st.sampled_from(("prompt", "answer", "id", "solution", "other")), PLAIN, max_size=5), max_size=4
)


@long
@given(ROWS, st.sampled_from(("jsonl", "json")))
@fuzzed
def test_any_rows_are_problems_or_a_sentence(tmp_path: Path, rows: list[dict[str, Any]], ending: str):
    path = tmp_path / f"data.{ending}"
    texts = [json.dumps(row) for row in rows]
    path.write_text("\n".join(texts) if ending == "jsonl" else f"[{','.join(texts)}]", encoding="utf-8")
    problems = _or_sentence(lambda: load_problems(str(path), config=DataConfig(), split="train"))
    if problems is not None:
        assert len({p.id for p in problems}) == len(problems) == len(rows)


@long
@given(
    st.binary(max_size=300) | st.text(max_size=300).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.sampled_from(("jsonl", "json", "csv", "parquet")),
)
@fuzzed
def test_any_bytes_are_data_or_a_sentence(tmp_path: Path, content: bytes, ending: str):
    path = tmp_path / f"data.{ending}"
    path.write_bytes(content)
    _or_sentence(lambda: load_problems(str(path), config=DataConfig(), split="train"))


def _mutate(path: Path, position: int, content: bytes, cut: bool) -> None:
    found = path.read_bytes()
    at = position % (len(found) + 1)
    path.write_bytes(found[:at] + content + (b"" if cut else found[at + len(content) :]))


MUTATION = st.tuples(st.integers(0, 2**20), st.binary(max_size=12), st.booleans())


@long
@given(MUTATION)
@fuzzed
def test_a_changed_parquet_file_is_data_or_a_sentence(tmp_path: Path, mutation: tuple[int, bytes, bool]):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"prompt": ["1+1", "2+2"], "answer": ["2", "4"], "id": ["a", "b"]}), path)
    _mutate(path, *mutation)
    _or_sentence(lambda: load_problems(str(path), config=DataConfig(), split="train"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SyntheticRun(tmp_path_factory.mktemp("runs") / "demo").go(2).path
    weights = {"w": torch.ones(4)}
    save_checkpoint(run, Checkpoint(2, weights, weights, torch.get_rng_state(), {"tokens": 1}), keep=0)
    return run


@long
@given(st.data(), MUTATION)
@fuzzed
def test_a_changed_run_directory_is_read_or_refused(
    finished: Path, tmp_path: Path, data: st.DataObject, mutation: tuple[int, bytes, bool]
):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run)
    victim = data.draw(st.sampled_from(sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())))
    _mutate(run / victim, *mutation)
    assert list(check_run(run))
    _or_sentence(lambda: describe_run(run))
    _or_sentence(lambda: read_checkpoint(run / "checkpoints" / "step-000002"))
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        assert all(isinstance(r, dict) for r in read_lines(run / log))


@long
@given(st.binary(max_size=400))
@fuzzed
def test_any_bytes_are_a_journal(tmp_path: Path, content: bytes):
    path = tmp_path / "j"
    path.write_bytes(content)
    journal = StepJournal(path, {"format": 1}, lambda _: None)
    assert not journal.known
    journal.close()
