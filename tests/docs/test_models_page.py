"""The page of architectures: what it says of some of them is found again, and a wrong cell would be noticed."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
import transformers

from e3rl.engine.torch.storage import RowSize
from e3rl.train import attribution
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "models.md"
SOME = ("qwen3", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "kimi_linear", "glm_moe_dsa", "bloom", "rwkv")


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "models_page.py"))


@pytest.fixture(scope="module")
def lines() -> dict[str, list[str]]:
    """Cells by architecture, without the count of candidates, their numbers replaced by the reasons they lead to."""
    table, reasons = PAGE.read_text(encoding="utf-8").split("## Why not")
    notes = dict(line.split(". ", 1) for line in reasons.replace("\n   ", " ").splitlines() if line[:1].isdigit())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]
    without_counts = {name: [engine, *rest] for name, engine, _, *rest in rows[2:]}
    return {n: [notes[c[4:-1]] if c.startswith("no (") else c for c in cells] for n, cells in without_counts.items()}


def test_every_architecture_has_its_row(tool, lines):
    assert tuple(lines) == tool["ARCHITECTURES"]
    assert len(lines) >= 30


@pytest.mark.parametrize("name", SOME)
def test_the_page_says_what_is_found(tool, lines, name):
    if f"transformers {transformers.__version__};" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page was written with another version of transformers")
    with tool["_quiet"]():
        assert list(tool["tried"](name, tool["SCRIPTS"][:2]).cells()) == lines[name]


def test_the_fast_path_is_that_of_the_page(tool, lines):
    with tool["_quiet"]():
        fast = {
            name: "yes" if tool["fusable"](tool["build"](name)) else "no"
            for name in ("llama", "qwen2", "mistral", "olmo2")
        }
    assert fast == {name: lines[name][1] for name in fast}


def test_vllms_column_is_that_of_its_registry(tool, lines):
    """For every row, of the class that transformers loads: an own implementation, transformers' code, dropped, unlisted."""
    kinds = {name: tool["MODEL_FOR_CAUSAL_LM_MAPPING"][tool["CONFIG_MAPPING"][name]].__name__ for name in lines}
    assert {name: cells[-1] for name, cells in lines.items()} == {
        name: tool["VLLM"]["classes"].get(kind, "–") for name, kind in kinds.items()
    }
    assert [lines[name][-1] for name in ("qwen3", "olmo3", "bamba", "rwkv")] == ["own", "transformers", "dropped", "–"]


def test_a_model_that_is_served_wrongly_is_not_called_exact(tool, monkeypatch):
    """With the checks at a run's start out of the way, a window that the engine doesn't know of is seen."""
    model = tool["build"]("mistral")
    monkeypatch.setattr("e3rl.engine.torch.engine.check_exactness", lambda model: RowSize(1024))
    monkeypatch.setattr("e3rl.engine.torch.cache.sliding_window", lambda model: None)
    assert tool["_engine"](model)[0].startswith("NOT REFUSED")


def test_a_model_that_is_packed_wrongly_is_not_called_exact(tool, monkeypatch):
    model = tool["build"]("mistral")
    monkeypatch.setitem(tool["main"].__globals__, "require_scorable", lambda model: None)
    respected = attribution.attention_behind
    monkeypatch.setattr(attribution, "attention_behind", lambda *states, window, **kw: respected(*states, **kw))
    assert tool["_training"](model).startswith("NOT REFUSED")


def test_attribution_is_compared_with_the_model_itself(tool, monkeypatch):
    model, other = tool["build"]("llama"), tool["build"]("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    monkeypatch.setattr("copy.deepcopy", lambda model: other)
    assert (
        tool["_attribution"](model) == "attention shares differ from those of the matrices that eager attention returns"
    )
