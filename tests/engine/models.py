"""Tiny random models: enough weight spread for distributions that are neither flat nor certain."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 53
EOS = (0, 1)

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_OWN: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
}
ARCHITECTURES = tuple(_OWN)

_SOME_SLIDE = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_SLIDING: dict[str, dict[str, Any]] = {
    "Gemma3": {"head_dim": 8, **_SOME_SLIDE},
    "Olmo3": _SOME_SLIDE,
    "Qwen3": {"head_dim": 8, "use_sliding_window": True, **_SOME_SLIDE},
    "Mistral": {"sliding_window": 5},
    "Phi3": {"sliding_window": 5},
}
SLIDING = tuple(_SLIDING)
"""Architectures with windows: those of which some layers slide, and those of which all do."""


def build(name: str, attention: str | None = "sdpa", **settings: Any) -> Any:
    """A random model of an architecture, always the same for the same arguments, in eval mode."""
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**{**_SHAPE, **settings})
    config._attn_implementation = attention
    torch.manual_seed(7)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@functools.cache
def tiny(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A shared tiny model that the torch engine serves; tests must not change it."""
    return build(name, attention, **_OWN[name]).to(dtype)


@functools.cache
def sliding(name: str, attention: str = "sdpa") -> Any:
    """A shared tiny model whose layers, or every other one, see 5 positions; tests must not change it."""
    return build(name, attention, **_SLIDING[name])


RECURRENT = (
    "qwen3_5_text",
    "qwen3_next",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "falcon_h1",
    "olmo_hybrid",
    "lfm2",
    "lfm2_moe",
    "mamba2",
)
"""Architectures with recurrent states: gated delta nets, Mamba 2, short convolutions; the last one attends nowhere."""


@functools.cache
def _models_page() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "tools" / "models_page.py"))


@functools.cache
def page_model(name: str) -> Any:
    """A shared tiny model of an architecture as docs/models.md tries it; tests must not change it."""
    with _models_page()["_quiet"]():
        return _models_page()["build"](name)
