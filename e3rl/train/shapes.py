"""Shapes of the models that the recipes name, so that a plan can be made where no hub can be reached."""

from __future__ import annotations

from typing import Any

# type, layers, hidden, feed-forward, heads, KV heads, head, vocabulary, tied; from the models' config.json files
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 128, 151_936, True),
    "Qwen/Qwen3-4B": ("qwen3", 36, 2560, 9728, 32, 8, 128, 151_936, True),
    "Qwen/Qwen3-8B": ("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, False),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 128, 151_936, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 36, 2048, 11_008, 16, 2, 128, 151_936, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, False),
}


def known_config(path: str) -> Any:
    """The transformers config of a model named here; None for others."""
    from transformers import AutoConfig

    if path not in _SHAPES:
        return None
    kind, layers, hidden, forward, heads, kv_heads, head, vocabulary, tied = _SHAPES[path]
    return AutoConfig.for_model(
        kind,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=forward,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
