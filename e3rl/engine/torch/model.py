"""The fastest slot model for a given model, and the checks, one of them numeric, whether a model can be served at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from e3rl.engine.torch.cache import RECURRENT, GenericSlotModel, evaluating, unknown_layers
from e3rl.engine.torch.fused import FusedSlotModel, FusedWeights, fusable
from e3rl.engine.torch.storage import RowSize, SlotStorage, StepRows
from e3rl.engine.torch.threads import Division
from e3rl.errors import UserError
from e3rl.models import narrow_window, unwrapped

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class SlotModel(Protocol):
    """Runs prompts and decode steps over a `SlotStorage` and returns next-token logits."""

    storage: SlotStorage
    device: torch.device

    def refresh(self) -> None:
        """Take the model's weights again where they can be seen to have changed. No row may hold keys of others."""

    def take_weights(self) -> None:
        """Take the model's weights again, however they were changed. No row may hold keys of others."""

    def division(self, rows: int) -> Division:
        """How a decode step of ``rows`` rows is best divided among threads."""

    def prefill(self, ids: Sequence[int], slot: int) -> Tensor:
        """Run a prompt into a slot; logits of the token after it, [V]."""

    def packs(self, length: int) -> bool:
        """Whether a prompt of ``length`` tokens has the same bits alone and beside others."""

    def prefill_together(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[Tensor]:
        """Run prompts that `packs` into slots, in any thread; for each the logits of the token after it, [V]."""

    def decode(self, rows: StepRows) -> Tensor:
        """Feed each row's token at its position; logits of the tokens after them, [R, V]."""


def slot_model(model: Any, slots: int, max_length: int) -> SlotModel:
    """The written-out forward pass for models of the Llama family, else the model's own."""
    model = unwrapped(model)
    if fusable(model):
        return FusedSlotModel(FusedWeights.of(model), slots, max_length)
    return GenericSlotModel(model, slots, max_length)


def require_servable(model: Any) -> None:
    """Raise UserError for a model whose cached state is neither keys and values nor a state in the library's cache."""
    reason = _obstacle(model)
    if reason:
        raise _refusal(model, reason)


def _refusal(model: Any, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} can't be served by the torch engine: {reason}. It serves decoder-only models whose layers "
        "attend to the past, all of it or a sliding window, or keep a recurrent state in transformers' cache."
    )


def _obstacle(model: Any) -> str | None:
    config = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None)
    in_cache = any(kind in RECURRENT or kind.startswith("hybrid") for kind in layer_types or ())
    attention = getattr(config, "_attn_implementation", "") or ""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if unknown := unknown_layers(model):
        return unknown
    if not in_cache and (getattr(model, "_is_stateful", False) or not hasattr(config, "num_attention_heads")):
        return "it keeps a recurrent state of its own, outside transformers' cache"
    if any(rope in _rope_types(config) for rope in _LENGTH_DEPENDENT_ROPE):
        return f"its rotary embedding ({', '.join(_rope_types(config))}) depends on the longest row of the batch"
    if "flash" in attention or "flex" in attention or "paged" in attention:
        return f"its attention '{attention}' takes no mask per row; load it with attn_implementation='sdpa'"
    if any(getattr(peft, "is_prompt_learning", False) for peft in (getattr(model, "peft_config", None) or {}).values()):
        return "its PEFT adapter puts virtual tokens before the prompt"
    return None


def _rope_types(config: Any) -> list[str]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return sorted({str(r.get("rope_type", r.get("type", "default"))) for r in (nested or [rope])})


def check_exactness(model: Any) -> RowSize:
    """What a row of the cache takes; raises UserError where decoding and full passes disagree on two ragged rows.

    The rows are prefilled and decoded together; one is rolled back and decoded again with another token. Windows are made
    so small for this that the rows outgrow them.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (9, 6))
    redrawn = [*short[:4], (short[4] + 1) % vocabulary]
    with torch.inference_mode(), evaluating(model), narrow_window(model):
        expected = torch.stack([_full_logits(model, ids) for ids in (long, short, long, redrawn)])
        try:
            served = slot_model(model, slots=2, max_length=len(long))
            logits = _served_logits(served, long, short, redrawn)
        except Exception as error:  # a model may fail in any way
            raise _refusal(model, f"decoding with a slot cache fails: {type(error).__name__}: {error}") from error
    scale = expected.abs().max().item()
    difference = (logits - expected).abs().max().item()
    allowed = scale * _TOLERANCE.get(model.dtype, _TOLERANCE[torch.bfloat16])
    if not difference <= allowed:  # NaN too
        raise _refusal(
            model,
            f"with a slot cache its logits differ by up to {difference:.3g} from a full forward pass (allowed "
            f"{allowed:.3g}, largest logit {scale:.3g})",
        )
    return served.storage.row_size


def _served_logits(served: SlotModel, long: Sequence[int], short: Sequence[int], redrawn: Sequence[int]) -> Tensor:
    """Logits after ``long`` and ``short``, whose last two tokens are decoded, then after ``long`` and ``redrawn``."""
    served.prefill(long[:-2], slot=0)
    served.prefill(short[:-2], slot=1)

    def decode(back: int, long_id: int, short_id: int) -> Tensor:
        positions = (len(long) - back, len(short) - back)
        return served.decode(StepRows((long_id, short_id), positions, served.storage, served.device))[:2].float()

    served.storage.keep_states((0, 1), (0, 1))
    decode(2, long[-2], short[-2])
    first = decode(1, long[-1], short[-1])
    served.storage.restore_states((0, 1), (0, 1))
    again_short = decode(2, long[-2], redrawn[-1])[1:]
    again_long = decode(1, long[-1], short[-1])[:1]
    return torch.cat([first, again_long, again_short])


def _full_logits(model: Any, ids: Sequence[int]) -> Tensor:
    ids_1T = torch.tensor([ids], device=model.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0, -1].float()
