"""Text that was sent is never taken back: not over a half character, not over a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from e3rl.data.toolcalls import FORMATS
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.serve.messages import ToolChoice
from e3rl.serve.text import CallStream, TextStream


class Bytes:
    """A tokenizer with a token a byte."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def feed(pieces: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stops)
    texts = []
    for index, piece in enumerate(pieces):
        texts.append(stream.add(list(piece), last=index == len(pieces) - 1))
        if stream.stopped:
            break
    return texts, stream.stopped is not None


def test_a_split_character_waits_for_its_other_half():
    whole = "né".encode()
    assert feed([whole[:2], whole[2:]]) == (["n", "é"], False)


def test_a_character_that_never_completes_is_sent_at_the_end():
    assert feed([b"n", b"\xc3"]) == (["n", "\ufffd"], False)


def test_what_may_begin_a_stop_string_is_held_back():
    assert feed([b"1+1=2E", b"N", b"D and more"], ["END"]) == (["1+1=2", "", ""], True)
    assert feed([b"1+1=2E", b"N", b"OUGH"], ["END"]) == (["1+1=2", "", "ENOUGH"], False)


def test_the_earliest_stop_string_counts():
    assert feed([b"a;b.c"], [".", ";"]) == (["a"], True)


@given(
    text=st.text(alphabet="abé\u20ac", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 90), max_size=8),
)
def test_any_division_into_segments_gives_the_same_text(text: str, stops: list[str], cuts: list[int]):
    raw = text.encode()
    edges = [0, *sorted(min(c, len(raw)) for c in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    ends = [text.find(s) for s in stops if s in text]
    texts, stopped = feed(pieces, stops)
    assert "".join(texts) == text[: min(ends, default=len(text))]
    assert stopped == bool(ends)


@pytest.mark.parametrize("stop", ["aab", "ab"])
def test_a_stop_string_that_repeats_itself_is_found(stop: str):
    assert feed([b"a", b"a", b"a", b"b"], [stop]) == (["", "", "a", ""] if stop == "aab" else ["", "a", "a", ""], True)


@pytest.mark.parametrize(("keep", "text"), [(False, "1+1=2"), (True, "1+1=2END")])
def test_a_stop_string_says_how_many_tokens_it_took(keep: bool, text: str):
    stream = TextStream(Bytes(), ["END"], keep_stop=keep)
    stream.add(list(b"1+1"), last=False)
    assert "1+1" + stream.add(list(b"=2END and more"), last=False) == text
    assert (stream.stopped, stream.kept) == ("END", 8)


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
LLAMA = '{"name": "f", "parameters": {}}'


@pytest.mark.parametrize(
    ("form", "text", "shown", "calls"),
    [
        ("hermes", f"I look.\n{CALL}", "I look.", 1),
        ("hermes", f"{CALL}\n{CALL}", "", 2),
        ("hermes", "a < b <tool", "a < b <tool", 0),
        ("hermes", "so <tool_call>not one</tool_call> \n", "so <tool_call>not one</tool_call> \n", 0),
        ("llama3", LLAMA, "", 1),
        ("llama3", " {} or so", " {} or so", 0),
        ("llama3", f"It is {LLAMA}", f"It is {LLAMA}", 0),
    ],
)
def test_calls_come_at_the_end_and_the_rest_as_it_is_written(form: str, text: str, shown: str, calls: int):
    for size in (1, 3, 7, 100):
        stream = CallStream(FORMATS[form], ToolChoice())
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        sent = [stream.add(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
        assert "".join(t for t, _ in sent) == shown
        assert [len(c) for _, c in sent] == [0] * (len(pieces) - 1) + [calls]


def test_text_before_a_call_is_not_held_back():
    stream = CallStream(FORMATS["hermes"], ToolChoice())
    assert stream.add("I look it up. <to", last=False) == ("I look it up.", [])
    assert stream.add("day>", last=False) == (" <today>", [])


def test_where_calls_may_not_be_parallel_the_first_is_taken():
    stream = CallStream(FORMATS["hermes"], ToolChoice(parallel=False))
    assert len(stream.add(CALL * 2, last=True)[1]) == 1


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of the SentencePiece kind: spaces are marks, unknown characters are bytes, read as a whole."""
    pieces = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abc.,", "▁ab", "▁c"]
    model = BPE({p: i for i, p in enumerate(pieces)}, [("▁", "c")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = Decoders([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@given(data=st.data())
def test_text_read_in_windows_is_the_text_of_the_whole(data: st.DataObject):
    tokenizer = data.draw(st.sampled_from(TOKENIZERS))
    words = st.sampled_from(("a", " ab", " c.", ", ", "é", "€", "你好", "🙂", "  ", "cab", "<s>"))
    text = "".join(data.draw(st.lists(words, max_size=80)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=30)))
    stream = TextStream(tokenizer, ())
    pieces = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, len(ids)])]
    sent = ""
    for index, piece in enumerate(pieces):
        would = stream.would_add(piece)
        sent += (part := stream.add(piece, last=index == len(pieces) - 1))
        assert would.startswith(part)
    assert sent == tokenizer.decode(ids, skip_special_tokens=True)


TOKENIZERS = [byte_fallback(), build_tokenizer(256), Bytes()]
