"""The vLLM engine against the recomputing oracle: the same draws give the same tokens, entropies and perturbations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from e3rl.engine.protocol import Sampling
from e3rl.engine.recompute import RecomputeEngine
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.testing.engine import ENGINE_CHECKS
from e3rl.testing.scripts import EngineContract, assert_same
from e3rl.types import Candidate, Draw
from tests.engine.models import EOS, VOCAB
from tests.vllm.conftest import LENGTH, ROWS

TOLERANCE = 1e-3


def generate(engine: Any, row: int, tokens: int, attempt: int = 0, sampling: Sampling | None = None) -> Candidate:
    engine.extend(row, tokens, Draw(0, 0, "p", 0, 0, attempt), sampling or Sampling())
    [(delivered, candidate)] = engine.poll()
    assert delivered == row
    return candidate


def oracle(model: Any) -> RecomputeEngine:
    return RecomputeEngine(model, eos_ids=EOS, cache_rows=ROWS, max_length=LENGTH)


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable, model: Any, make_engine: Callable[[], Any]):
    check(EngineContract(make_engine, lambda: oracle(model), VOCAB, EOS, ROWS, LENGTH, TOLERANCE))


def test_greedy_decoding_gives_the_oracles_tokens(model: Any, make_engine: Callable[[], Any]):
    coldest, prompt = Sampling(temperature=1e-3), (5, 6, 7, 8)
    expected_engine, engine = oracle(model), make_engine()
    [expected_row], [row] = expected_engine.prefill(prompt, 1), engine.prefill(prompt, 1)
    expected = generate(expected_engine, expected_row, 40, sampling=coldest)
    assert generate(engine, row, 40, sampling=coldest).ids.tolist() == expected.ids.tolist()


def test_one_token_runs_again_after_a_commit_and_after_an_erasure(core: Any, make_engine: Callable[[], Any]):
    engine = make_engine()
    [row] = engine.prefill(tuple(range(2, 30)), 1)
    kept, calls, sent = 0, core.calls, core.measure_bytes
    for attempt in range(12):
        candidate = generate(engine, row, 12, attempt, Sampling(top_k=3))
        if attempt % 3 == 2 and not candidate.ended and kept + 24 <= LENGTH - 28:
            kept += len(candidate.ids)
        else:
            engine.rollback(row, kept)
    stats = engine.stats
    assert stats.after_commit.requests + stats.after_erasure.requests == 11
    assert (stats.after_commit.most, stats.after_erasure.most) == (1, 1)
    assert core.calls - calls == stats.requests
    assert core.measure_bytes - sent == 20 * stats.sampled_tokens


def test_a_row_whose_keys_were_given_up_goes_on_to_the_same_tokens(
    model: Any, core: Any, make_engine: Callable[[], Any]
):
    """As where vLLM has no room to hold them: the prefix comes from the prefix cache, or runs again."""
    engine, expected_engine = make_engine(), oracle(model)
    [row], [expected_row] = engine.prefill(tuple(range(2, 40)), 1), expected_engine.prefill(tuple(range(2, 40)), 1)
    for segment in range(3):
        expected = generate(expected_engine, expected_row, 8, segment)
        assert_same(generate(engine, row, 8, segment), expected, TOLERANCE, f"segment {segment}")
        core.abandon([engine._rows[row].parked])
    assert engine.stats.after_commit.most > 1
    engine.release(row)


@pytest.mark.timeout(120)
def test_an_engine_that_slept_wakes_up_for_a_request_and_for_new_weights(model: Any, core: Any):
    """vLLM's worker keeps its memory on a CPU; its scheduler pauses, forgets what is cached and is woken as on a GPU."""
    from e3rl.engine.vllm.engine import VllmEngine

    engine = VllmEngine(model, eos_ids=EOS, max_rows=ROWS, cache_rows=ROWS, max_length=LENGTH, sleeps=True, core=core)
    prompt, drawn = tuple(range(45, 5, -1)), []  # more than a block, and no other test's
    for _ in range(3):
        [row] = engine.prefill(prompt, 1)
        before = engine.stats.cached_tokens
        drawn.append(generate(engine, row, 8).ids.tolist())
        assert engine.stats.cached_tokens == before
        engine.rest()  # a row is held: it stays awake
        assert len(generate(engine, row, 3, 1).ids) > 0
        engine.release(row)
        engine.rest()
        engine.rest()
        if len(drawn) == 2:
            engine.load_weights({}, 1)
    assert drawn[0] == drawn[1] == drawn[2]


def test_sleeping_on_a_cpu_is_refused(model: Any):
    from e3rl.engine.vllm.core import VllmCore

    with pytest.raises(UserError, match="vllm_sleep = true needs a GPU"):
        VllmCore(model, eos_ids=EOS, max_rows=1, cache_rows=1, max_length=LENGTH, sleeps=True)


def test_new_weights_are_used_and_nothing_cached_under_the_old_ones(model: Any, make_engine: Callable[[], Any]):
    prompt = tuple((5 * i + 2) % VOCAB for i in range(40))  # more than a block, so that a stale one would be found
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = make_engine()

    def first() -> Candidate:
        [row] = engine.prefill(prompt, 1)
        candidate = generate(engine, row, 8)
        engine.release(row)
        return candidate

    old = first()
    generator = torch.Generator().manual_seed(3)
    changed = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in before.items()
        if tensor.ndim == 2
    }
    try:
        engine.load_weights(changed, 1)
        expected_engine = oracle(model)
        [row] = expected_engine.prefill(prompt, 1)
        expected = generate(expected_engine, row, 8)
        assert expected.ids.tolist() != old.ids.tolist()
        assert_same(first(), expected, TOLERANCE, "after the update")
        assert engine.policy_version == 1
    finally:
        engine.load_weights(before, 2)
    assert_same(first(), old, TOLERANCE, "with the old weights again")


def test_weights_of_another_shape_are_refused_and_change_nothing(model: Any, make_engine: Callable[[], Any]):
    engine = make_engine()
    name = next(n for n, p in model.named_parameters() if p.ndim == 2)
    with pytest.raises(ValueError, match="has shape"):
        engine.load_weights({name: torch.zeros(3, 3)}, 1)
    with pytest.raises(ValueError, match="no weights named"):
        engine.load_weights({"head.of.another": torch.zeros(3)}, 1)
    assert engine.policy_version == 0


def test_broken_weights_end_in_an_error_that_names_the_draw(model: Any, make_engine: Callable[[], Any]):
    engine = make_engine()
    name, weight = next((n, p) for n, p in model.named_parameters() if "norm" in n)
    before = weight.detach().clone()
    engine.load_weights({name: torch.full_like(before, float("nan"))}, 1)
    [row] = engine.prefill((3, 4, 5), 1)
    try:
        with pytest.raises(NonFiniteLogits, match="prompt 'p', sibling 0"):
            generate(engine, row, 4)
    finally:
        engine.release(row)
        engine.load_weights({name: before}, 2)


ENDLESS = Draw(0, 0, "p", 3, 0, 0)
"""After the prompt 5, 6, 7, 8 it draws no end in 70 tokens."""


def interrupting(engine: Any, polls: int) -> list[tuple[int, Candidate]]:
    """Poll until something is delivered; the first polls are interrupted while they wait for vLLM's processes."""
    found: list[tuple[int, Candidate]] = []
    while not found:
        if polls > 0:
            threading.Timer(0.002, engine.interrupt).start()
        found, polls = engine.poll(), polls - 1
    return found


def test_an_interrupted_poll_returns_and_nothing_shows_of_it(model: Any, make_engine: Callable[[], Any]):
    engine, prompt = make_engine(), (5, 6, 7, 8)
    engine.interrupt()
    [row] = engine.prefill(prompt, 1)
    engine.extend(row, 60, ENDLESS, Sampling())
    assert engine.poll() == [], "interrupted before it began"
    [(_, candidate)] = interrupting(engine, 5)
    expected = oracle(model)
    [other] = expected.prefill(prompt, 1)
    expected.extend(other, 60, ENDLESS, Sampling())
    assert len(candidate.ids) == 60
    assert_same(candidate, expected.poll()[0][1], TOLERANCE, "interrupted")


def test_a_request_joins_and_another_leaves_in_the_middle_of_a_segment(
    core: Any, model: Any, make_engine: Callable[[], Any]
):
    engine = make_engine()
    [long, leaves] = engine.prefill((5, 6, 7, 8), 2)
    for row in (long, leaves):
        engine.extend(row, 70, ENDLESS, Sampling())
    engine.interrupt()
    assert engine.poll() == []
    engine.release(leaves)
    [short] = engine.prefill((9, 3), 1)
    engine.extend(short, 4, Draw(0, 0, "p", 0, 0, 0), Sampling())
    [(first, candidate)] = interrupting(engine, 3)
    assert first == short, "the one of 4 tokens doesn't wait for the one of 70"
    assert len(core._open) == 1, "vLLM has let go of the row that left"
    [(second, _)] = interrupting(engine, 3)
    assert (second, core._llm.has_unfinished_requests()) == (long, False)
    expected = oracle(model)
    [other] = expected.prefill((9, 3), 1)
    assert candidate.ids.tolist() == generate(expected, other, 4).ids.tolist()
