"""The lab's tokenizer as transformers saves and loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from e3rl.lab.problems import FAMILIES, generate, solution
from e3rl.lab.tokenizer import CHARACTERS, build_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path):  # type: ignore[no-untyped-def]
    build_tokenizer(max_length=64).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_one_token_a_character_and_back(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.encode(CHARACTERS)
    assert len(set(ids)) == len(ids) == len(CHARACTERS)
    assert tokenizer.decode(ids) == CHARACTERS
    assert tokenizer.unk_token_id not in ids


def test_every_problem_can_be_written(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for family in FAMILIES.values():
        for problem in generate(family.name, max(family.levels), "train", 20):
            text = f"{problem.prompt}\n{solution(problem)}"
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_characters_become_unknown(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.encode("aéb") == [tokenizer.encode("a")[0], tokenizer.unk_token_id, tokenizer.encode("b")[0]]


def test_chat_template(tokenizer) -> None:  # type: ignore[no-untyped-def]
    turns = [{"role": "system", "content": "Add up."}, {"role": "user", "content": "1+1:"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin|><|system|>Add up.<|end|><|user|>1+1:<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text)
    assert len(ids) == 1 + 3 + 2 + len("Add up.") + len("1+1:")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Add up.1+1:"


def test_a_finished_conversation_ends_where_generation_stops(tokenizer) -> None:  # type: ignore[no-untyped-def]
    turns = [{"role": "user", "content": "1+1:"}, {"role": "assistant", "content": "A:2"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id


def test_an_unknown_role_is_refused(tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])


def test_padding_goes_left(tokenizer) -> None:  # type: ignore[no-untyped-def]
    batch = tokenizer(["1", "123"], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"][0] == [0, 0, 1]
