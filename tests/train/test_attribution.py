"""The attention hook against the attention matrices that the eager implementation returns."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from e3rl.errors import UserError
from e3rl.plan.dry_run import Allocations
from e3rl.train.attribution import AttributionSettings, AttributionTap, attribution_layers, packed_attention
from e3rl.train.packing import PackedRow
from e3rl.train.scoring import score_row
from tests.engine.models import ARCHITECTURES, SLIDING, VOCAB, build, sliding, tiny
from tests.train.packs import sequence


def _slow_attribution(model, prompt, response, window, layers):
    """Eq 19 from full attention matrices, one number at a time."""
    attentions = model(input_ids=torch.tensor([prompt + response]), output_attentions=True).attentions
    length = len(prompt) + len(response)
    queries = range(max(len(prompt), length - window), length)
    return [
        float(torch.stack([attentions[n][0, h, q, t] for n in layers for h in range(4) for q in queries]).mean())
        for t in range(len(prompt), length)
    ]


@pytest.mark.parametrize(
    ("make", "name"), [*((tiny, name) for name in ARCHITECTURES), *((sliding, name) for name in SLIDING)]
)
@pytest.mark.parametrize("which", ["last", "all"])
@torch.no_grad()
def test_attribution_equals_eager_attention_of_each_sequence_alone(make: Callable[..., Any], name: str, which: str):
    """Eq 19. Last L' response tokens, mean over heads and layers, prompt left out; siblings share a prompt and a word."""
    model, eager = make(name), make(name, "eager")
    ids = torch.randint(2, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [(ids[:3], ids[3:11]), (ids[:3], ids[3:5] + ids[11:14]), (ids[14:19], ids[19:21])]
    row = PackedRow.of([sequence(p, r) for p, r in texts], torch.device("cpu"))
    layers = attribution_layers(model, which)
    with packed_attention(model):
        tap = AttributionTap(row, 4, layers)
        model.model(input_ids=row.ids_N[None], position_ids=row.positions_N[None], packed_row=row, attribution_tap=tap)
    for (prompt, response), found_T in zip(texts, tap.attribution(), strict=True):
        assert found_T is not None
        expected = _slow_attribution(eager, prompt, response, 4, sorted(layers))
        assert found_T.tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_a_token_behind_a_sliding_window_gets_no_attention():
    """As the eager implementation masks it: queries see the window's tokens and no others."""
    model, eager = build("Mistral", sliding_window=3), build("Mistral", "eager", sliding_window=3)
    prompt, response = [2, 3, 4], [5, 6, 7, 8, 9, 10, 11]
    row = PackedRow.of([sequence(prompt, response)], torch.device("cpu"))
    with packed_attention(model):
        tap = AttributionTap(row, 2, frozenset({0, 1}))
        model.model(input_ids=row.ids_N[None], position_ids=row.positions_N[None], packed_row=row, attribution_tap=tap)
    [found_T] = tap.attribution()
    assert found_T is not None
    assert found_T.tolist() == pytest.approx(_slow_attribution(eager, prompt, response, 2, [0, 1]), abs=1e-6)
    assert found_T[:3].tolist() == [0.0] * 3
    assert found_T[-4:].min() > 0


@torch.no_grad()
@pytest.mark.parametrize("pairs", [1, 60, 10_000])
def test_shares_are_the_same_however_many_trajectories_are_looked_at_together(pairs: int, monkeypatch):
    """Responses of 1 to 12 tokens, L' = 4, an erased candidate among them: alone, in twos and threes, and all at once."""
    model, settings = tiny("Qwen3"), AttributionSettings(4, frozenset({0, 1}))
    ids = torch.randint(2, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    texts = [sequence(ids[:5], ids[5 : 5 + size]) for size in (12, 1, 3, 4, 7)]
    texts.insert(2, sequence(ids[:5], ids[5:9], masked=2, erased=True))
    cpu = torch.device("cpu")
    monkeypatch.setattr("e3rl.train.attribution._PAIRS", pairs)
    with packed_attention(model):
        found = score_row(model, PackedRow.of(texts, cpu), 1.0, settings).shares
        for text, shares_T in zip(texts, found, strict=True):
            alone_T = score_row(model, PackedRow.of([text], cpu), 1.0, settings).shares[0]
            assert (shares_T is None) == text.erased
            torch.testing.assert_close(shares_T, alone_T, atol=1e-6, rtol=0)


def test_shares_ask_for_bytes_in_proportion_to_the_rows_length():
    """No matrix of queries times keys: twice the tokens ask for twice the bytes."""
    model, settings = (
        build("Qwen3", head_dim=8, max_position_embeddings=4096),
        AttributionSettings(16, frozenset({0, 1})),
    )
    asked = []
    for length in (1024, 2048, 4096):
        ids = torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(3)).tolist()
        row = PackedRow.of([sequence(ids[:9], ids[9:])], torch.device("cpu"))
        with torch.no_grad(), packed_attention(model), Allocations() as counted:
            score_row(model, row, 1.0, settings)
        asked.append(counted.peak)
    assert asked[2] - asked[1] == pytest.approx(2 * (asked[1] - asked[0]), rel=0.05)


@torch.no_grad()
def test_erased_candidates_get_no_attribution_and_leave_that_of_others_alone():
    model, settings = tiny("Llama"), AttributionSettings(8, frozenset({1}))
    kept, erased = sequence([2, 3], [4, 5, 6]), sequence([2, 3], [4, 7], masked=1, erased=True)
    with packed_attention(model):
        both = score_row(model, PackedRow.of([kept, erased], torch.device("cpu")), 1.0, settings).shares
        alone = score_row(model, PackedRow.of([kept], torch.device("cpu")), 1.0, settings).shares
    assert both[1] is None
    torch.testing.assert_close(both[0], alone[0])


def test_the_hook_leaves_the_model_as_it_was():
    model = tiny("Llama")
    with packed_attention(model):
        assert model.config._attn_implementation == "e3rl_packed"
    assert model.config._attn_implementation == "sdpa"


def test_d9_names_the_layers():
    assert attribution_layers(tiny("Llama"), "last") == frozenset({1})
    assert attribution_layers(tiny("Llama"), "all") == frozenset({0, 1})


def test_layers_that_attend_under_another_number_are_no_zeros():
    """A block that several layers share says which layer it is once."""
    model = build("Llama")
    model.model.layers[1].self_attn.layer_idx = -1
    settings = AttributionSettings(4, attribution_layers(model, "last"))
    row = PackedRow.of([sequence([2, 3, 4], [5, 6, 7])], torch.device("cpu"))
    with packed_attention(model), pytest.raises(UserError, match="layers 1 gave no attention"):
        score_row(model, row, 1.0, settings).by_sequence()
