"""When text leaves: plain decoding sends tokens as they are drawn, erasable decoding a segment when it is kept."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from e3rl.serve.choices import Piece, ServedChoice
from e3rl.serve.errors import ApiError
from e3rl.serve.requests import DecodingRequest, Output
from e3rl.serve.service import Service
from e3rl.serve.worker import Outbox
from tests.serve.conftest import serving
from tests.serve.test_server import HELLO, LONG, TEXT, post, settled, slowed

ASKED = DecodingRequest("tiny", ("3",), n=2, max_tokens=150, seed=4, extension=LONG, output=Output(logprobs=0))


async def answered(service: Service, request: DecodingRequest) -> tuple[list[ServedChoice], list[tuple[int, Piece]]]:
    """The samples at the end, and every piece of them."""
    running = service.start(request, Outbox())
    pieces = [(choice.index, piece) async for choice, piece in service.pieces(running)]
    service.drop(running)
    return list(running.choices), pieces


def test_plain_text_streams_as_it_is_drawn_and_is_the_same_answer(make_service: Callable[..., Service]):
    service = make_service(endless=True)
    (whole, few), (streamed, many) = (
        asyncio.run(answered(service, replace(ASKED, stream=stream))) for stream in (False, True)
    )
    assert len(few) == 2, "a segment of 200 holds each answer"
    for index, choice in enumerate(streamed):
        pieces = [piece for i, piece in many if i == index]
        assert max(len(p.tokens.ids) for p in pieces) <= 4
        assert "".join(p.text for p in pieces) == choice.text == whole[index].text
        assert [i for p in pieces for i in p.tokens.ids] == whole[index].tokens.ids
        assert [p for q in pieces for p in q.tokens.logprobs] == whole[index].tokens.logprobs
        assert [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)
        assert {p.facts["segment"] for p in pieces} == {0}
        assert (choice.segments, choice.finish) == (1, "length")
    assert settled(service)


def test_short_segments_of_a_plain_stream_are_counted_as_such(make_service: Callable[..., Service]):
    service = make_service(endless=True)
    asked = replace(ASKED, max_tokens=20, stream=True, extension={"erase": False, "segment_length": 6})
    choices, pieces = asyncio.run(answered(service, asked))
    assert [c.segments for c in choices] == [4, 4]
    sizes = Counter[int]()
    for piece in (p for i, p in pieces if i == 0):
        sizes[piece.facts["segment"]] += piece.facts["tokens"]
    assert sizes == {0: 6, 1: 6, 2: 6, 3: 2}


def test_the_first_token_is_sent_at_once_and_the_others_by_fours(make_service: Callable[..., Service]):
    service = make_service(endless=True)
    _, pieces = asyncio.run(answered(service, replace(ASKED, n=1, max_tokens=12, stream=True)))
    assert [len(piece.tokens.ids) for _, piece in pieces] == [1, 4, 4, 3]


def test_erasable_text_comes_by_segments(make_service: Callable[..., Service]):
    asked = replace(ASKED, stream=True, max_tokens=18, extension={"erase": True})
    _, pieces = asyncio.run(answered(make_service(endless=True), asked))
    assert [len(p.tokens.ids) for i, p in pieces if i == 0] == [6, 6, 6]


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_plain_decoding_within_a_few_tokens(make_service: Callable[..., Service], stream: bool):
    service = make_service(endless=True)
    text = asyncio.run(answered(service, ASKED))[0][0].text
    before = service._engine.stats.sampled_tokens
    (choice,), _ = asyncio.run(answered(service, replace(ASKED, n=1, stop=(text[8:11],), stream=stream)))
    assert settled(service)
    assert (choice.finish, choice.stop_reason, choice.segments) == ("stop", text[8:11], 1)
    assert choice.text == text[: text.index(text[8:11])]
    assert service._engine.stats.sampled_tokens - before < 60  # of 150


def test_what_is_followed_frees_its_rows_when_the_client_leaves(make_service: Callable[..., Service], monkeypatch):
    service = make_service(endless=True)
    polls = slowed(service, monkeypatch)

    async def ask() -> None:
        running = service.start(replace(ASKED, n=8, stream=True), Outbox())
        while len(polls) < 4:
            await asyncio.sleep(0.01)
        service.drop(running)

    asyncio.run(ask())
    assert settled(service)
    assert (len(polls) < 12, service._worker._driver._followed) == (True, {})


def test_each_client_has_a_queue_of_its_own(make_service: Callable[..., Service], monkeypatch):
    service = make_service(queue_limit=2, endless=True)
    slowed(service, monkeypatch)
    prefill = service._engine.prefill
    # the others come while the first group's prompt is run: it waits no more
    monkeypatch.setattr(service._engine, "prefill", lambda *asked: time.sleep(0.2) or prefill(*asked))
    one = replace(ASKED, n=1)

    async def ask() -> list[Any]:
        running = [service.start(replace(ASKED, n=8), Outbox(), ("a",))]
        while not service.load()["decoding"]:
            await asyncio.sleep(0.01)
        for client, user in (*[("a", name) for name in "--xxyy"], ("b", ""), ("b", "")):
            running.append(service.start(replace(one, user=user), Outbox(), (client, "key")))
        refused = []
        for client, user in (("a", "x"), ("a", "new"), ("d", "")):
            with pytest.raises(ApiError) as error:
                service.start(replace(one, user=user), Outbox(), (client, "key"))
            refused.append((error.value.status, str(error.value)))
        for found in running:
            service.drop(found)
        return refused

    assert asyncio.run(ask()) == [
        (429, "2 of your groups wait already; try again soon"),
        (429, "6 groups from your address wait already; try again soon"),
        (429, "8 groups wait already; try again soon"),
    ]
    assert settled(service)


def test_who_asks_is_told_apart_by_key_and_user(make_service: Callable[..., Service], monkeypatch):
    service = make_service()
    asked: list[tuple[str, ...]] = []
    submit = service._worker.submit
    monkeypatch.setattr(service._worker, "submit", lambda tickets: (asked.append(tickets[0].client), submit(tickets)))
    with serving(service) as url:
        for key, user in (
            ("", {}),
            ("Bearer k", {}),
            ("Bearer k", {"user": "u"}),
            ("Bearer k", {"safety_identifier": "u"}),
        ):
            assert post(url, TEXT, {**HELLO, **user}, {"Authorization": key} if key else {})[0] == 200
        assert post(url, TEXT, {**HELLO, "user": 3})[1]["error"]["param"] == "user"
    home = "localhost"
    assert asked == [(home, "", ""), (home, "Bearer k", ""), *[(home, "Bearer k", "u")] * 2]
