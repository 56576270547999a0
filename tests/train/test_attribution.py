"""The attention hook against the attention matrices that the eager implementation returns."""

import pytest
import torch

from e3rl.train.attribution import AttributionTap, attribution_layers, tapped
from tests.rollout.models import ARCHITECTURES, VOCAB, build, tiny


def _slow_attribution(model, ids_SL, visible_SL, prompt_lengths, lengths, window, layers):
    """Eq 19 from full attention matrices, one number at a time."""
    attentions = model(input_ids=ids_SL, attention_mask=visible_SL, output_attentions=True).attentions
    result = torch.zeros(ids_SL.shape)
    for s, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        queries = range(max(prompt, length - window), length)
        for t in range(prompt, length):
            values = [attentions[layer][s, head, q, t] for layer in layers for head in range(4) for q in queries]
            result[s, t] = torch.stack(values).mean()
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("which", ["last", "all"])
@torch.no_grad()
def test_attribution_equals_eager_attention_on_ragged_rows(name: str, which: str):
    """Eq 19. Last L' response tokens, mean over heads and layers, prompt left out."""
    settings = {"head_dim": 8} if name == "Qwen3" else {"sliding_window": None} if name == "Mistral" else {}
    model, eager = tiny(name), build(name, "eager", **settings)
    eager.load_state_dict(model.state_dict())
    prompt_lengths, lengths = [3, 5, 2], [11, 7, 4]
    ids_SL = torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    visible_SL = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    layers = attribution_layers(model, which)
    tap = AttributionTap(torch.tensor(prompt_lengths), torch.tensor(lengths), 4, layers)
    with tapped(model, tap):
        hooked = model(input_ids=ids_SL, attention_mask=visible_SL).logits
    expected = _slow_attribution(eager, ids_SL, visible_SL, prompt_lengths, lengths, 4, sorted(layers))
    torch.testing.assert_close(tap.attribution(), expected, atol=1e-6, rtol=1e-5)
    plain = model(input_ids=ids_SL, attention_mask=visible_SL).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(hooked[row, :length], plain[row, :length], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_hook_leaves_the_model_as_it_was():
    model = tiny("Llama")
    tap = AttributionTap(torch.tensor([1]), torch.tensor([3]), 8, frozenset({0}))
    with pytest.raises(RuntimeError, match="attention registry"):
        tap.attribution()
    with tapped(model, tap):
        assert model.config._attn_implementation == "e3rl_attribution"
    assert model.config._attn_implementation == "sdpa"


def test_d9_names_the_layers():
    assert attribution_layers(tiny("Llama"), "last") == frozenset({1})
    assert attribution_layers(tiny("Llama"), "all") == frozenset({0, 1})
