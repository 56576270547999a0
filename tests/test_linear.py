"""The work that reading takes grows no faster than a text's length times its logarithm: everything but the checker's room,
which tests/rewards/test_linear.py reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e3rl.data.toolcalls import FORMATS, parse_tool_calls
from e3rl.environments.code import program_of
from e3rl.errors import UserError
from e3rl.lab import arith, chain
from e3rl.parsing import parse_json, parse_toml
from e3rl.sections import shown
from e3rl.serve.errors import ApiError
from e3rl.serve.messages import ToolChoice
from e3rl.serve.requests import read_chat, read_generate, read_text, read_tokenize
from e3rl.serve.text import CallStream, TextStream
from e3rl.train.journal import records
from tests.steep import PACKAGE, PIECES, steep_patterns, too_steep, with_patterns

OTHER_FILES = sorted(
    path
    for room in (PACKAGE, *PACKAGE.iterdir())
    if room.is_dir() and room.name != "rewards"
    for path in with_patterns(room)
)
MORE_PIECES = (
    "```", "```python\n", "``` ", "```\t", "<tool_call>", "</tool_call>", "<tool_call>{", "<function=f>", "<parameter=a>",
    "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "[TOOL_CALLS]", "[ARGS]", '{"name": "f", "arguments": {}}',
    '{"a":', "[[", '"', "\\u0000", "A:1", "A:1 ", "A: ", "r" * 50, "Aa.", ".", "a.b=", "#### ", "\\boxed ", "x = [", "\ufffd",
)  # fmt: skip


PLACES = (("", ""), ("x", "y"), ("```", "x"))


def _refusing(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def call(text: str) -> Any:
        try:
            return read(text)
        except (UserError, ApiError):
            return None

    return call


def _json(read: Callable[[Any], Any], make: Callable[[str], Any]) -> Callable[[str], Any]:
    """A request's reader, on a body that holds the text; the body is parsed as the server does."""
    return _refusing(lambda text: read(json.loads(json.dumps(make(text)))))


class Letters:
    """A tokenizer with a token for each character."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def _streamed(text: str) -> None:
    stream = TextStream(Letters(), ("</s>", "\n\n"))
    calls = CallStream(FORMATS["hermes"], ToolChoice())
    for at in range(0, len(text), 50):
        part = stream.add(list(map(ord, text[at : at + 50])), last=at + 50 >= len(text))
        calls.add(part, last=at + 50 >= len(text))
        if stream.stopped:
            break


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
READERS: dict[str, Callable[[str], Any]] = {
    "program_of": program_of,
    "parse_json": _refusing(lambda t: parse_json(t, "here")),
    "parse_json, nested": _refusing(lambda t: parse_json(json.dumps({"a": [t] * 3, t: 1}), "here")),
    "parse_toml": _refusing(lambda t: parse_toml(t, "here")),
    "shown": shown,
    "streams": _streamed,
    "chat": _json(read_chat, lambda t: {"model": t, "messages": [{"role": "user", "content": t}], t: 1}),
    "roles": _json(read_chat, lambda t: {"model": "m", "messages": [{"role": t, "content": t}]}),
    "calls": _json(
        read_chat,
        lambda t: {
            "model": "m",
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": t}}]},
                {"role": "tool", "content": t},
            ],
        },
    ),
    "text": _json(read_text, lambda t: {"model": "m", "prompt": t, "stop": [t[:200]], "e3rl": {t: 1}}),
    "ids": _json(read_generate, lambda t: {"token_ids": list(map(ord, t)), "sampling_params": {t: 1}}),
    "tokenize": _json(read_tokenize, lambda t: {"prompt": t, "tools": [TOOL], t: None}),
    "journal": lambda t: list(records(t.encode("utf-8", "replace"))),
    **{
        f"calls, {name}": lambda t, form=form: parse_tool_calls(t, form, [TOOL])  # type: ignore[misc]
        for name, form in FORMATS.items()
    },
    "lab chain": lambda t: chain.FAMILY.grade("11+1:", "12", t),
    "lab arith": lambda t: arith.FAMILY.grade("What is 1 + 1?", "2", t),
}


@pytest.mark.parametrize("name", READERS)
def test_reading_takes_linear_time(name: str):
    assert too_steep(READERS[name], (1_000, 8_000), PLACES, (*PIECES, *MORE_PIECES)) == []


@pytest.mark.parametrize("path", OTHER_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_pattern_is_linear(path: Path):
    assert steep_patterns(path, PLACES) == []


def test_the_gate_sees_what_grows_faster():
    assert too_steep(lambda t: [None for _ in range(len(t) ** 2 // 20)], (1_000, 8_000), PLACES[:1], ["ab"])
    assert not too_steep(lambda t: sorted(t * 2), (1_000, 8_000), PLACES[:1], ["ab"])
