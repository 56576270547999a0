"""The embedded model: small, an ordinary directory, and half way to solving its problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from e3rl.lab import lab_directory, mazes_directory, tools_directory
from e3rl.lab.measure import sample, score
from e3rl.lab.pretrain import CONTEXT
from e3rl.lab.problems import FAMILIES, generate
from e3rl.lab.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def lab():  # type: ignore[no-untyped-def]
    model = AutoModelForCausalLM.from_pretrained(lab_directory(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(lab_directory())


def test_it_is_small(lab) -> None:  # type: ignore[no-untyped-def]
    assert sum(p.numel() for p in lab[0].parameters()) <= 1_000_000
    assert sum(file.stat().st_size for file in lab_directory().iterdir()) <= 4_000_000


def test_the_tokenizer_is_the_one_that_the_code_builds(lab) -> None:  # type: ignore[no-untyped-def]
    built = build_tokenizer(CONTEXT)
    assert lab[1].get_vocab() == built.get_vocab()
    assert lab[1].chat_template == built.chat_template
    assert lab[0].config.eos_token_id == lab[0].generation_config.eos_token_id == built.eos_token_id
    assert lab[0].config.pad_token_id == built.pad_token_id


# Bounds leave room for other processors, whose rounding changes which responses are drawn.
@pytest.mark.parametrize(("family", "low", "high"), [("chain", 0.3, 0.6), ("path", 0.05, 0.4)])
def test_it_half_solves_what_it_trains_on(lab, family: str, low: float, high: float) -> None:  # type: ignore[no-untyped-def]
    problems = generate(family, FAMILIES[family].training_level, "heldout", 64)
    torch.manual_seed(0)
    result = score(problems, sample(*lab, problems, samples=4, max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0))
    assert low < result.average < high
    assert result.passed > 1.5 * result.average  # some groups hold right and wrong responses: a learning signal


def test_the_tool_model_is_small_and_has_the_tokenizer_that_the_code_builds() -> None:
    assert sum(file.stat().st_size for file in tools_directory().iterdir()) <= 3_100_000
    found, built = AutoTokenizer.from_pretrained(tools_directory()), build_tokenizer(CONTEXT, tools=True)
    assert found.get_vocab() == built.get_vocab()
    assert found.chat_template == built.chat_template
    text = "<|tool|>+5<|end|><|assistant|><tool_call>book<arg_key>sum</arg_key><arg_value>52</arg_value></tool_call>"
    ids = found(text, add_special_tokens=False)["input_ids"]
    assert (len(ids), found.decode(ids)) == (20, text)
    assert found.decode(ids, skip_special_tokens=True) == text.replace("<|tool|>", "").replace(
        "<|end|><|assistant|>", ""
    )


def test_the_maze_model_is_small_and_solves_some_mazes_in_its_budget_and_runs_out_of_it_in_others() -> None:
    assert sum(file.stat().st_size for file in mazes_directory().iterdir()) <= 3_100_000
    tokenizer = AutoTokenizer.from_pretrained(mazes_directory())
    assert tokenizer.get_vocab() == build_tokenizer(CONTEXT).get_vocab()
    model = AutoModelForCausalLM.from_pretrained(mazes_directory(), dtype=torch.float32).eval()
    problems = generate("maze", FAMILIES["maze"].training_level, "heldout", 24)
    torch.manual_seed(0)
    responses = sample(model, tokenizer, problems, samples=4, max_new_tokens=96, temperature=1.0, top_p=1.0, top_k=0)
    assert 0.04 < score(problems, responses).average < 0.3
    cut = sum(len(text) == 96 for texts in responses for text in texts)
    assert 0.15 < cut / 96 < 0.6


@pytest.mark.parametrize("directory", [lab_directory, tools_directory, mazes_directory])
def test_its_checksum_stands_in_the_docs(directory: Callable[[], Path]) -> None:
    found = hashlib.sha256((directory() / "model.safetensors").read_bytes()).hexdigest()
    assert found in (Path(__file__).parents[2] / "docs" / "lab.md").read_text(encoding="utf-8")
