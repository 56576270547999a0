"""The torch engine against the recomputing oracle, and what it must not do: recompute, leak, go wrong quietly."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.engine.protocol import Sampling
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.testing.engine import ENGINE_CHECKS
from e3rl.testing.scripts import (
    EngineContract,
    ExtendRow,
    Poll,
    ReleaseRow,
    Rollback,
    Start,
    assert_candidate,
    assert_same,
    assert_same_transcript,
    play,
    random_script,
)
from e3rl.types import Candidate, Draw
from tests.engine.models import ARCHITECTURES, EOS, SLIDING, VOCAB, build, sliding, tiny

ROWS, LENGTH = 6, 48
TOLERANCE = 1e-5


def torch_engine(
    model: Any, max_rows: int = 3, cache_rows: int = ROWS, max_length: int = LENGTH, eos_ids: Sequence[int] = EOS
) -> TorchEngine:
    return TorchEngine(model, eos_ids=eos_ids, max_rows=max_rows, cache_rows=cache_rows, max_length=max_length)


def oracle(model: Any) -> RecomputeEngine:
    return RecomputeEngine(model, eos_ids=EOS, cache_rows=ROWS, max_length=LENGTH)


def contract(model: Any, **settings: Any) -> EngineContract:
    return EngineContract(
        lambda: torch_engine(model), lambda: oracle(model), VOCAB, EOS, ROWS, LENGTH, TOLERANCE, **settings
    )


def draw(attempt: int = 0, sibling: int = 0) -> Draw:
    return Draw(seed=5, step=0, prompt_id="p", sibling=sibling, segment=0, attempt=attempt)


def drain(engine: Any) -> dict[int, Candidate]:
    candidates = {}
    while delivered := engine.poll():
        candidates.update(delivered)
    return candidates


def generate(engine: Any, row: int, tokens: int, attempt: int = 0) -> Candidate:
    engine.extend(row, tokens, draw(attempt), Sampling())
    return drain(engine)[row]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.5, 1.0, 1.4]),
    top_p=st.sampled_from([0.6, 1.0]),
    top_k=st.sampled_from([0, 1, 7]),
    entropy_distribution=st.sampled_from(["full", "truncated"]),
) | st.builds(Sampling, temperature=st.sampled_from([0.5, 1.0]), measured_at=st.sampled_from([1.0, 2.0]))
TOKENS = st.integers(0, VOCAB - 1)
STARTS = st.builds(Start, st.lists(TOKENS, min_size=1, max_size=9).map(tuple), st.integers(1, 3))
EXTENDS = st.builds(ExtendRow, st.integers(0, 9), st.integers(1, 6), SAMPLINGS)
ROLLBACKS = st.builds(Rollback, st.integers(0, 9), st.integers(0, 20))
OTHERS = ROLLBACKS | st.builds(ReleaseRow, st.integers(0, 9)) | st.just(Poll())
ACTIONS = st.lists(STARTS | EXTENDS | EXTENDS | OTHERS, min_size=2, max_size=16)
SCRIPTS = st.builds(lambda start, rest: [start, *rest], STARTS, ACTIONS)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=30)  # of each architecture: 120 scripts
@given(script=SCRIPTS, max_rows=st.integers(1, ROWS), spare_rows=st.integers(0, 2))
def test_any_script_gives_the_oracles_candidates(name, script, max_rows, spare_rows):
    model = tiny(name)
    engine = torch_engine(model, max_rows, ROWS + spare_rows)
    expected = play(oracle(model), script, contract(model))
    got = play(engine, script, contract(model))
    for key in got.keys() & expected.keys():
        assert got[key].ids.tolist() == expected[key].ids.tolist()
    assert_same_transcript(got, expected, TOLERANCE)


@pytest.mark.parametrize("name", SLIDING)
@settings(max_examples=10)
@given(script=SCRIPTS)
def test_windows_slide_as_the_oracles_do(name, script):
    """Rolled back, a row sees again what had slid out of its window."""
    model = sliding(name)
    got = play(torch_engine(model), script, contract(model))
    assert_same_transcript(got, play(oracle(model), script, contract(model)), TOLERANCE)


def test_a_window_is_seen_in_what_is_generated():
    model = sliding("Mistral")
    wide = build("Mistral", sliding_window=None)
    seen = []
    for each in (model, wide):
        engine = torch_engine(each, eos_ids=())
        [row] = engine.prefill(list(range(2, 12)), 1)
        seen.append(generate(engine, row, 12).entropies.tolist())
    assert seen[0] != pytest.approx(seen[1], abs=1e-2)


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(contract(tiny("Qwen3")))


@pytest.mark.parametrize("check", ENGINE_CHECKS[1:], ids=lambda check: check.__name__)
def test_oracle_keeps_the_contract(check):
    model = tiny("Llama")
    check(dataclasses.replace(contract(model), make_engine=lambda: oracle(model)))


def test_eager_attention_equals_the_oracle():
    script = random_script(21, VOCAB)
    got = play(torch_engine(tiny("Llama", "eager")), script, contract(tiny("Llama")))
    assert_same_transcript(got, play(oracle(tiny("Llama")), script, contract(tiny("Llama"))), TOLERANCE)


def test_rows_longer_than_a_mask_bucket_equal_the_oracle():
    model, prompts = tiny("Qwen3"), ([3] * 30, list(range(2, 40)))
    results = []
    slow = RecomputeEngine(model, eos_ids=(), cache_rows=2, max_length=80)
    for engine in (torch_engine(model, max_length=80, eos_ids=()), slow):
        rows = [engine.prefill(prompt, 1)[0] for prompt in prompts]
        for i, row in enumerate(rows):
            engine.extend(row, 35, draw(sibling=i), Sampling())
        candidates = drain(engine)
        results.append({(i, 0): candidates[row] for i, row in enumerate(rows)})
    assert_same_transcript(*results, TOLERANCE)


def test_lora_wrapped_model_equals_the_oracle():
    peft = pytest.importorskip("peft")
    model = build("Qwen2")
    plain = generate(e := torch_engine(model), e.prefill([4, 5, 6], 1)[0], 12)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    script = random_script(3, VOCAB)
    expected = play(oracle(wrapped), script, contract(wrapped))
    assert_same_transcript(play(torch_engine(wrapped), script, contract(wrapped)), expected, TOLERANCE)
    adapted = generate(e := torch_engine(wrapped), e.prefill([4, 5, 6], 1)[0], 12)
    assert adapted.ids.tolist() != plain.ids.tolist()  # the adapter takes part


def test_bfloat16_follows_its_own_forward_pass():
    model = tiny("Qwen3", dtype=torch.bfloat16)
    engine = torch_engine(model)
    prompt = [5, 9, 2, 30]
    [row] = engine.prefill(prompt, 1)
    candidate = generate(engine, row, 10)
    assert_candidate(candidate, 10, EOS)
    ids = torch.tensor([[*prompt, *candidate.ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    assert list(candidate.logprobs) == pytest.approx(
        logp.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist(), abs=0.15
    )


def test_prompt_is_prefilled_once_for_its_siblings():
    engine = torch_engine(tiny("Llama"))
    rows = engine.prefill([4, 5, 6, 7, 8], 4)
    for i, row in enumerate(rows):
        engine.extend(row, 1, draw(sibling=i), Sampling())
    candidates = drain(engine)
    assert engine.stats.prompt_tokens == 5
    assert engine.stats.decode_steps == 0  # the prompt's own logits give the first token
    assert len({int(candidates[row].ids[0]) for row in rows}) > 1


def test_erasure_passes_no_token_of_the_prefix_through_the_model_again():
    engine = torch_engine(tiny("Qwen3"), eos_ids=())
    rows = engine.prefill([4, 5, 6], 3)
    for segment in range(3):
        for attempt in range(4):
            for i, row in enumerate(rows):
                engine.rollback(row, 4 * segment)
                engine.extend(row, 4, Draw(0, 0, "p", i, segment, attempt), Sampling())
            drain(engine)
    stats = engine.stats
    assert stats.prompt_tokens == 3
    assert stats.refed_tokens == 0
    assert stats.sampled_tokens == 3 * 3 * 4 * 4
    # a token is fed for each sampled one, except a candidate's first when its logits are kept: in the first segment for
    # every attempt, later for the retries
    assert stats.decode_row_steps == stats.sampled_tokens - 3 * (4 + 3 + 3)


def test_rollback_to_elsewhere_feeds_one_token_again():
    engine = torch_engine(tiny("Qwen3"), eos_ids=())
    [row] = engine.prefill([4, 5, 6], 1)
    generate(engine, row, 8)
    engine.rollback(row, 5)
    before = engine.stats.decode_row_steps
    generate(engine, row, 3, attempt=1)
    assert engine.stats.refed_tokens == 1
    assert engine.stats.decode_row_steps == before + 3


def test_memory_is_fixed_whatever_is_erased():
    engine = torch_engine(tiny("Qwen3"), cache_rows=4, max_length=40)
    [row] = engine.prefill([4, 5, 6], 1)
    # keys and values, layers, slots with the scratch slot, heads, positions (a multiple of 32), dim, bytes
    expected = 2 * 2 * (4 + 1) * 2 * 64 * 8 * 4
    assert engine.stats.kv_bytes == expected
    for attempt in range(6):
        generate(engine, row, 10, attempt)
        engine.rollback(row, 0)
    assert engine.stats.kv_bytes == engine._slot_model.storage.bytes == expected


def test_rows_that_go_on_are_not_moved():
    engine = torch_engine(tiny("Llama"), max_rows=3, eos_ids=())
    rows = engine.prefill([4, 5, 6], 3)
    for segment in range(3):
        for i, row in enumerate(rows):
            engine.extend(row, 4, Draw(0, 0, "p", i, segment, 0), Sampling())
        drain(engine)
    assert engine.stats.moved_tokens == 0
    engine.extend(rows[2], 4, draw(), Sampling())
    drain(engine)
    assert engine.stats.moved_tokens == 2 * (3 + 12) - 2  # rows 0 and 2 change places; the last token is not cached


def test_finished_rows_make_room_for_waiting_ones():
    engine = torch_engine(tiny("Llama"), max_rows=2, eos_ids=())
    rows = engine.prefill([4, 5, 6], 4)
    for i, (row, tokens) in enumerate(zip(rows, (9, 3, 3, 3), strict=True)):
        engine.extend(row, tokens, draw(sibling=i), Sampling())
    delivered = [[r for r, _ in engine.poll()] for _ in range(4)]
    assert delivered == [[rows[1]], [rows[2]], [rows[3]], [rows[0]]]
    assert engine.stats.decode_steps == 8  # as many as the longest needs after its first token


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_admission_and_slots_do_not_show_in_the_result(max_rows):
    model = tiny("Mistral")
    script = [
        Start((3, 4, 5), 3),
        Start((9,), 3),
        *(ExtendRow(i, 7 - i) for i in range(6)),
        Poll(),
        *(ExtendRow(i, 3) for i in range(6)),
    ]
    expected = play(torch_engine(model, 6), script, contract(model))
    assert len(expected) == 12
    assert_same_transcript(play(torch_engine(model, max_rows, 8), script, contract(model)), expected, TOLERANCE)


def test_training_flags_and_gradients_survive_generation():
    model = build("Qwen3", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    engine = torch_engine(model)
    [row] = engine.prefill([4, 5, 6], 1)
    candidate = generate(engine, row, 6)
    assert [module.training for module in model.modules()] == flags
    quiet = torch_engine(model.eval())
    assert generate(quiet, quiet.prefill([4, 5, 6], 1)[0], 6) == candidate  # no dropout either way
    model(input_ids=torch.tensor([[4, 5, 6]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_new_weights_change_what_is_generated_and_the_version():
    model, other = build("Llama"), build("Llama", initializer_range=0.2)
    engine = torch_engine(model)
    [row] = engine.prefill([4, 5, 6], 1)
    before = generate(engine, row, 8)
    engine.release(row)
    engine.load_weights(dict(model.state_dict()), version=1)
    [row] = engine.prefill([4, 5, 6], 1)
    assert generate(engine, row, 8) == before
    engine.release(row)
    engine.load_weights(other.state_dict(), version=2)
    [row] = engine.prefill([4, 5, 6], 1)
    reference = torch_engine(other)
    assert generate(engine, row, 8) == generate(reference, reference.prefill([4, 5, 6], 1)[0], 8) != before
    assert engine.policy_version == 2


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match="lm_tail"):
        torch_engine(tiny("Llama")).load_weights({"lm_tail.weight": torch.zeros(1)}, 1)


@pytest.mark.parametrize("make", [torch_engine, oracle])
def test_non_finite_logits_name_the_row_and_spoil_no_other(make):
    model = build("Llama")
    engine = make(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    [broken], [healthy] = engine.prefill([4, 6, 5, 2, 9, 7], 1), engine.prefill([4, 5, 6], 1)
    engine.extend(healthy, 5, draw(), Sampling())
    engine.extend(broken, 5, draw(sibling=3), Sampling())
    with pytest.raises(NonFiniteLogits, match="sibling 3") as caught:
        drain(engine)
    assert caught.value.draw == draw(sibling=3)
    engine.release(broken)
    [reused] = engine.prefill([4, 5, 6], 1)  # shorter than what left NaN in this slot
    engine.extend(reused, 5, draw(), Sampling())
    candidates = drain(engine)
    assert_same(candidates[healthy], candidates[reused], TOLERANCE, "the healthy row")


def test_non_finite_logits_travel_between_processes():
    error = pickle.loads(pickle.dumps(NonFiniteLogits(draw())))
    assert error.draw == draw()
    assert "prompt 'p'" in str(error)


@pytest.mark.parametrize(
    ("settings", "message"), [({"max_rows": 0}, "max_rows = 0"), ({"max_rows": 7, "cache_rows": 6}, "cache_rows = 6")]
)
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        torch_engine(tiny("Llama"), **settings)


@pytest.mark.parametrize("prompt", [[3, VOCAB], [-1, 3]])
def test_token_ids_outside_the_vocabulary_are_refused(prompt):
    with pytest.raises(UserError, match="vocabulary"):
        torch_engine(tiny("Llama")).prefill(prompt, 1)


def test_a_failed_prefill_keeps_no_slot(monkeypatch):
    engine = torch_engine(tiny("Llama"))
    with monkeypatch.context() as patch:
        patch.setattr(engine._slot_model, "prefill", lambda ids, slot: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.prefill([4, 5], 2)
    assert engine.free_rows() == ROWS
    assert generate(engine, engine.prefill([4, 5], 1)[0], 3).ids.size
