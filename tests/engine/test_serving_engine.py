"""What a server asks of an engine beside decoding: hooks on the logits, and polls that end when they are interrupted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from e3rl.engine.protocol import Sampling
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.testing.scripts import assert_same
from e3rl.types import Candidate, Draw
from tests.engine.models import VOCAB, tiny

PROMPT = [4, 5, 6]


def make(kind: str, model: Any, rows: int = 4) -> Any:
    if kind == "torch":
        return TorchEngine(model, eos_ids=(), max_rows=rows, cache_rows=rows, max_length=64)
    return RecomputeEngine(model, eos_ids=(), cache_rows=rows, max_length=64)


def draw(sibling: int = 0, attempt: int = 0) -> Draw:
    return Draw(5, 0, "p", sibling, 0, attempt)


def finish(engine: Any, wanted: int = 1) -> dict[int, Candidate]:
    found: dict[int, Candidate] = {}
    while len(found) < wanted:
        found.update(engine.poll())
    return found


class Forbids:
    """Forbids the token that is the number of tokens so far and all above 20, and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, logits_V: Tensor, generated: Sequence[int]) -> None:
        self.shown.append(list(generated))
        logits_V[len(generated)] = -1e30
        logits_V[20:] = -1e30


@pytest.mark.parametrize("kind", ["torch", "recompute"])
def test_a_hook_decides_what_is_drawn_and_sees_what_was(kind: str):
    engine, hook = make(kind, tiny("Qwen3")), Forbids()
    row, other = engine.prefill(PROMPT, 2)
    engine.extend(row, 9, draw(), Sampling(), hook)
    engine.extend(other, 9, draw(1), Sampling())
    found = finish(engine, 2)
    ids = found[row].ids.tolist()
    assert max(ids) < 20 <= max(found[other].ids)
    assert all(token != place for place, token in enumerate(ids))
    assert hook.shown == [ids[:n] for n in range(9)]
    plain = make(kind, tiny("Qwen3"))
    [alone] = plain.prefill(PROMPT, 1)
    plain.extend(alone, 9, draw(1), Sampling())
    assert_same(finish(plain)[alone], found[other], 1e-5, "a neighbour of a hooked row")


@pytest.mark.parametrize("kind", ["torch", "recompute"])
def test_after_a_rollback_the_hook_is_shown_less_and_the_mark_is_as_it_was(kind: str):
    """The first token of a retry is drawn from logits that were kept: what a hook wrote into them must be gone."""
    engine = make(kind, tiny("Qwen3"))
    [row] = engine.prefill(PROMPT, 1)
    engine.extend(row, 3, draw(), Sampling())
    first = finish(engine)[row].ids.tolist()
    hook = Forbids()
    for attempt in range(2):
        engine.extend(row, 4, draw(0, attempt + 1), Sampling(), hook)
        ids = finish(engine)[row].ids.tolist()
        assert hook.shown == [first + ids[:n] for n in range(4)]
        hook.shown.clear()
        engine.rollback(row, 3)
    engine.extend(row, 4, draw(0, 9), Sampling())
    fresh = make(kind, tiny("Qwen3"))
    [again] = fresh.prefill(PROMPT, 1)
    fresh.append(again, first)
    fresh.extend(again, 4, draw(0, 9), Sampling())
    assert_same(finish(engine)[row], finish(fresh)[again], 1e-5, "a retry without its hook")


def test_what_is_measured_is_what_the_hook_left():
    engine = make("torch", tiny("Qwen3"))
    [row] = engine.prefill(PROMPT, 1)

    def two(logits_V: Tensor, generated: Sequence[int]) -> None:
        logits_V[:] = -1e30
        logits_V[[7, 8]] = torch.tensor([1.0, 1.0])

    engine.extend(row, 12, draw(), Sampling(), two)
    found = finish(engine)[row]
    assert set(found.ids.tolist()) == {7, 8}
    assert found.entropies.tolist() == pytest.approx([0.6931472] * 12)
    assert found.logprobs.tolist() == pytest.approx([-0.6931472] * 12)


def test_an_interrupted_poll_returns_and_nothing_shows_of_it():
    model = tiny("Qwen3")
    whole, cut = make("torch", model), make("torch", model)
    for engine in (whole, cut):
        for i, row in enumerate(engine.prefill(PROMPT, 3)):
            engine.extend(row, 20 + i, draw(i), Sampling())
    expected = list(finish(whole, 3).values())
    found: dict[int, Candidate] = {}
    polls = 0
    while len(found) < 3:
        cut.interrupt()
        found.update(cut.poll())
        polls += 1
    assert polls == 21  # the first token costs no step
    assert list(found.values()) == expected


def test_a_poll_of_some_steps_returns_and_what_was_drawn_until_then_is_the_beginning_of_the_candidate():
    model = tiny("Qwen3")
    whole, cut = make("torch", model), make("torch", model)
    for engine in (whole, cut):
        for i, row in enumerate(engine.prefill(PROMPT, 3)):
            engine.extend(row, 20 + i, draw(i), Sampling())
    expected, rows = list(finish(whole, 3).values()), list(cut._open)
    found = dict(cut.poll(4))
    assert (found, cut.stats.decode_steps) == ({}, 0), "the first token costs no step, and is told before one"
    assert [len(cut.drawn(row, 0)[0]) for row in rows] == [1, 1, 1]
    found = dict(cut.poll(4))
    assert (found, cut.stats.decode_steps) == ({}, 4)
    for row, candidate in zip(rows, expected, strict=True):
        for after, count in ((0, 5), (3, 2), (5, 0)):
            ids, logprobs = cut.drawn(row, after)
            assert ids == candidate.ids[after : after + count].tolist()
            assert logprobs == pytest.approx(candidate.logprobs[after : after + count].tolist(), abs=1e-12)
    while len(found) < 3:
        found.update(cut.poll(4))
    assert list(found.values()) == expected


def test_an_interrupt_comes_from_another_thread_in_the_middle_of_a_poll():
    engine = make("torch", tiny("Qwen3"))
    [row] = engine.prefill(PROMPT, 1)
    begun = threading.Event()

    def hook(logits_V: Tensor, generated: Sequence[int]) -> None:
        if len(generated) == 5:
            begun.set()
            interrupted.wait()

    interrupted = threading.Event()

    def interrupt() -> None:
        begun.wait()
        engine.interrupt()
        interrupted.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    engine.extend(row, 50, draw(), Sampling(), hook)
    assert engine.poll() == []
    thread.join()
    assert engine.stats.sampled_tokens == 6
    engine.release(row)
    assert engine.free_rows() == 4
    assert engine.poll() == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hooks_work_on_every_way_through_the_model(attention: str):
    model = tiny("Qwen3", attention)
    found = []
    for kind in ("torch", "recompute"):
        engine = make(kind, model)
        [row] = engine.prefill(PROMPT, 1)
        engine.extend(row, 9, draw(), Sampling(temperature=0.8, top_p=0.9, min_p=0.02), Forbids())
        found.append(finish(engine)[row])
    assert_same(found[0], found[1], 1e-5, "a hooked row")
    assert VOCAB > 20
