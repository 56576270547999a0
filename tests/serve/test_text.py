"""Text that was sent is never taken back: not over a half character, not over a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.serve.text import TextStream


class Bytes:
    """A tokenizer with a token a byte."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def feed(pieces: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Bytes(), stops)
    texts = []
    for index, piece in enumerate(pieces):
        texts.append(stream.add(list(piece), last=index == len(pieces) - 1))
        if stream.stopped:
            break
    return texts, stream.stopped


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
