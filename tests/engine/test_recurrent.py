"""Layers with recurrent states in the torch engine: exact after any rollback, and going back to a candidate's start is free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.model import check_exactness
from e3rl.engine.torch.storage import SlotStorage
from e3rl.errors import UserError
from e3rl.testing.engine import ENGINE_CHECKS
from e3rl.testing.scripts import assert_same, assert_same_transcript, play, random_script
from e3rl.types import Draw
from tests.engine.models import EOS, RECURRENT, VOCAB, page_model
from tests.engine.test_engine import ROWS, SCRIPTS, contract, drain, draw, generate, oracle, torch_engine

TOLERANCE = 1e-4
"""Prompts run in chunks, decoding token by token: the two round differently."""


@pytest.mark.parametrize("name", RECURRENT)
def test_scripts_give_the_oracles_candidates(name: str):
    """Prompts of one token and more, rollbacks to any place, rows that move and are taken again."""
    model = page_model(name)
    for seed in (3, 21):
        script = random_script(seed, VOCAB)
        got, expected = (play(make(model), script, contract(model)) for make in (torch_engine, oracle))
        assert_same_transcript(got, expected, TOLERANCE)


@settings(max_examples=15)
@given(script=SCRIPTS)
def test_any_script_gives_the_oracles_candidates(script):
    model = page_model("qwen3_5_text")
    got, expected = (play(make(model), script, contract(model)) for make in (torch_engine, oracle))
    assert_same_transcript(got, expected, TOLERANCE)


@pytest.mark.parametrize("check", ENGINE_CHECKS[1:], ids=lambda check: check.__name__)
def test_contract(check):
    check(contract(page_model("nemotron_h")))


@pytest.mark.parametrize("name", ["qwen3_5_text", "bamba", "lfm2"])
def test_erasing_runs_no_token_again_and_gives_what_a_new_row_gives(name: str):
    engine = torch_engine(page_model(name), eos_ids=())
    rows = engine.prefill([4, 5, 6], 3)
    held = engine.stats.kv_bytes
    for segment in range(3):
        for attempt in range(3):
            for i, row in enumerate(rows):
                engine.rollback(row, 4 * segment)
                engine.extend(row, 4, Draw(0, 0, "p", i, segment, attempt), Sampling())
            last = drain(engine)
    stats = engine.stats
    assert (stats.prompt_tokens, stats.refed_tokens, stats.appended_tokens) == (3, 0, 0)
    assert stats.decode_row_steps == stats.sampled_tokens - 3 * (3 + 2 + 2)
    assert stats.kv_bytes == engine._slot_model.storage.bytes == held
    slow = oracle(page_model(name))
    slow._eos_ids = frozenset()
    for i, row in enumerate(rows):
        [again] = slow.prefill([4, 5, 6], 1)
        for segment in range(3):
            slow.extend(again, 4, Draw(0, 0, "p", i, segment, 2), Sampling())
            found = drain(slow)[again]
        assert_same(last[row], found, TOLERANCE, f"row {i}")


def test_rollback_into_a_candidate_runs_its_tokens_again_and_before_it_all():
    engine = torch_engine(page_model("qwen3_5_text"), eos_ids=())
    [row] = engine.prefill([4, 5, 6], 1)
    generate(engine, row, 4)
    generate(engine, row, 8)  # from 7 tokens on; 14 of 15 tokens are in the state
    engine.rollback(row, 9)
    generate(engine, row, 1, attempt=1)
    assert engine.stats.refed_tokens == 11 - 7
    engine.rollback(row, 2)
    generate(engine, row, 1, attempt=2)
    assert engine.stats.refed_tokens == 4 + 4
    engine.rollback(row, 0)
    slow = oracle(page_model("qwen3_5_text"))
    slow._eos_ids = frozenset()
    [again] = slow.prefill([4, 5, 6], 1)
    assert_same(generate(engine, row, 6, 3), generate(slow, again, 6, 3), TOLERANCE, "from the prompt again")


def test_a_prompt_of_one_token_can_be_gone_back_to():
    """Nothing is left to run then: the states are those before the first token."""
    engine, slow = (make(page_model("bamba")) for make in (torch_engine, oracle))
    found = []
    for each in (engine, slow):
        each._eos_ids = frozenset()
        [row] = each.prefill([4], 1)
        generate(each, row, 4)
        generate(each, row, 4, attempt=1)
        each.rollback(row, 0)
        found.append(generate(each, row, 5, attempt=2))
    assert_same(*found, TOLERANCE, "from one token")


def test_other_tokens_after_a_rollback_are_not_taken_for_those_that_were_dropped():
    engine, slow = torch_engine(page_model("bamba"), eos_ids=()), oracle(page_model("bamba"))
    slow._eos_ids = frozenset()
    found = []
    for each in (engine, slow):
        [row] = each.prefill([4, 5, 6], 1)
        generate(each, row, 6)
        each.rollback(row, 0)
        each.append(row, [9, 8, 7, 6, 5, 4, 3, 2, 9, 8])
        found.append(generate(each, row, 5, attempt=1))
    assert_same(*found, TOLERANCE, "appended")


@pytest.mark.parametrize("ended", [True, False])
def test_rows_that_are_fed_on_after_their_end_go_on_exactly(ended: bool):
    """Where draws are read after several steps, as on a GPU, a row that ended has been fed tokens that are none of its own."""
    model = page_model("qwen3_next")
    plain = torch_engine(model, eos_ids=())
    [row] = plain.prefill([4, 5, 6], 1)
    ids = generate(plain, row, 12).ids.tolist()
    eos = (ids[3],) if ended else ()
    found = []
    for each in (torch_engine(model, eos_ids=eos), oracle(model)):
        each._read_after, each._eos_ids = 16, frozenset(eos)
        [row] = each.prefill([4, 5, 6], 1)
        first = generate(each, row, 12)
        assert (len(first.ids) < 12) == ended
        each.append(row, [9, 8, 7])
        found.append(generate(each, row, 5, attempt=1))
    assert_same(*found, TOLERANCE, "behind the end")


def test_prompts_longer_than_a_chunk_equal_the_oracle():
    """The gated delta rule runs prompts in chunks of 64."""
    model, prompt = page_model("qwen3_5_text"), [(7 * i) % VOCAB for i in range(70)]
    engine = torch_engine(model, max_length=160, eos_ids=())
    rows = engine.prefill(prompt, 2)
    slow = oracle(model)
    slow._max_length, slow._eos_ids = 160, frozenset()
    [again] = slow.prefill(prompt, 1)
    generate(engine, rows[0], 5)
    assert engine.stats.prompt_tokens == 70
    assert_same(generate(engine, rows[1], 60), generate(slow, again, 60), TOLERANCE, "the second sibling")


def test_memory_is_that_of_the_states_and_one_snapshot():
    engine = torch_engine(page_model("lfm2"), cache_rows=4)
    engine.prefill([4, 5, 6], 2)
    storage = engine._slot_model.storage
    # two convolutions of three inputs, 32 wide, in each of five slots, and once more; keys and values of two layers
    assert storage.state_bytes == 2 * (2 * 5 * 32 * 3 * 4)
    assert storage.bytes == storage.state_bytes + 2 * 2 * 5 * 2 * 64 * 8 * 4
    size = check_exactness(page_model("lfm2"))
    assert size.of(48) * 5 == storage.bytes


def test_an_engine_without_snapshots_is_seen(monkeypatch: pytest.MonkeyPatch):
    """The check at the start goes back as an erasure does."""
    monkeypatch.setattr(SlotStorage, "restore_states", lambda *args: None)
    for name in ("qwen3_5_text", "nemotron_h", "lfm2"):
        with pytest.raises(UserError, match=r"differ by up to \d"):
            TorchEngine(page_model(name), eos_ids=EOS, max_rows=1, cache_rows=1, max_length=16)


def test_rows_keep_their_states_when_they_move():
    """Two rows of five decode together, so they change places with others; all go on as if they had not."""
    model = page_model("lfm2")
    found = []
    for each in (torch_engine(model, max_rows=2, eos_ids=()), oracle(model)):
        each._eos_ids = frozenset()
        rows = [each.prefill([4 + i, 5, 6], 1)[0] for i in range(5)]
        for attempt, pair in enumerate(((0, 4), (1, 3), (2, 4), (0, 3), (1, 2))):
            for i in pair:
                each.extend(rows[i], 3, draw(attempt, i), Sampling())
            found.append({(i, attempt): c for i, c in enumerate(drain(each).values())})
    for got, expected in zip(found[:5], found[5:], strict=True):
        by_ids = {tuple(c.ids.tolist()): c for c in expected.values()}
        for candidate in got.values():
            assert_same(candidate, by_ids[tuple(candidate.ids.tolist())], TOLERANCE, "moved")
    assert ROWS == 6


def test_a_row_of_nan_leaves_no_trace_in_its_slot():
    storage = SlotStorage(2, 32)
    storage.add_state(("recurrent", 0, 0), torch.zeros(1, 2, 3))
    storage.states["recurrent", 0, 0][1] = torch.nan
    storage.scrub(1)
    assert not storage.states["recurrent", 0, 0].any()
