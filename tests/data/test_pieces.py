"""Pieces of text by token add up to the text, whatever the tokenizer does to bytes and spaces."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e3rl.data.pieces import Pieces

TEXT = "Add 17 and 25: 42, so 🙂 π≈3.14 — the end.\n  Next <b>line</b>"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the end of the line and the next"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def sentence_pieces() -> PreTrainedTokenizerFast:
    """Spaces belong to the words that follow them, and the first one is dropped when decoding."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁end": 2, "s": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_characters_of_several_tokens_come_with_the_last_of_them(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("a🙂b")
    assert len(ids) == 6
    assert Pieces(byte_level).split(ids) == ["a", "", "", "", "🙂", "b"]


def test_pieces_add_up_to_the_text(byte_level: PreTrainedTokenizerFast) -> None:
    pieces, ids = Pieces(byte_level), byte_level.encode(TEXT)
    assert "".join(pieces.split(ids)) == TEXT


def test_a_cut_character_is_kept_as_the_decoder_shows_it(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level.encode("ok 🙂")[:-1]
    pieces = Pieces(byte_level)
    assert "".join(pieces.split(ids)) == pieces.decode(ids)
    assert pieces.decode(ids).startswith("ok ")


def test_spaces_before_words_are_kept(sentence_pieces: PreTrainedTokenizerFast) -> None:
    assert Pieces(sentence_pieces).split([1, 2, 3, 1]) == ["the", " end", "s", " the"]


class Stripping:
    """A tokenizer that drops spaces at the end of a text, so what a space says depends on what follows."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(["a", " ", "b"][i] for i in ids).rstrip()


def test_pieces_add_up_where_what_a_token_says_depends_on_its_neighbours() -> None:
    texts, pieces = Pieces(Stripping()).columns(np.array([0, 2, 0, 1, 2, 1], np.int32), np.array([0, 2, 5, 6]))
    assert texts.to_pylist() == ["ab", "a b", ""]
    assert pieces.to_pylist() == ["a", "b", "a", "", " b", ""]


def test_a_candidate_whose_tokens_are_known_is_decoded_once(
    byte_level: PreTrainedTokenizerFast, sentence_pieces: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has characters of several tokens, or begins with a token that says something else inside a text."""
    for tokenizer, ids in ((byte_level, byte_level.encode(TEXT)), (sentence_pieces, [1, 2, 3, 2])):
        made, calls = Pieces(tokenizer), []
        found = made.columns(np.array(ids * 3, np.int32), np.arange(4) * len(ids))
        monkeypatch.setattr(made, "decode", lambda ids, decode=made.decode, calls=calls: calls.append(1) or decode(ids))
        assert made.columns(np.array(ids * 3, np.int32), np.arange(4) * len(ids)) == found
        assert len(calls) == 3


def test_the_text_and_pieces_of_many_candidates_are_those_of_each(byte_level: PreTrainedTokenizerFast) -> None:
    rng, made = random.Random(0), Pieces(byte_level)
    whole = byte_level.encode(TEXT * 3)
    cuts = sorted(rng.choices(range(len(whole)), k=40))
    bounds = [0, *cuts, len(whole)]  # some are empty, some begin or end inside a character
    texts, pieces = made.columns(np.array(whole, np.int32), np.array(bounds))
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        assert texts[n].as_py() == byte_level.decode(whole[a:b])
        assert "".join(pieces.to_pylist()[a:b]) == texts[n].as_py()
        assert pieces.to_pylist()[a:b] == Pieces(byte_level).split(whole[a:b])


def test_nothing_has_no_pieces(byte_level: PreTrainedTokenizerFast) -> None:
    assert Pieces(byte_level).split([]) == []
