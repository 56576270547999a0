"""Values of request fields, read strictly. None always means that the client left a field out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e3rl.serve.errors import invalid

IGNORED = {
    *("metadata", "prompt_cache_key", "prompt_cache_retention", "cache_salt", "priority", "request_id", "session_id"),
    *("spaces_between_special_tokens", "detokenize", "verbosity", "routed_experts_prompt_start"),
}
"""Fields that change nothing in an answer of this server."""

_NOT_OFFERED = (
    *("allowed_token_ids", "audio", "chat_template", "documents", "ec_transfer_params", "features", "function_call"),
    *("kv_transfer_params", "logprob_token_ids", "media_io_kwargs", "mm_processor_kwargs", "prediction"),
    *("prompt_embeds", "reasoning_effort", "repetition_detection", "stream_interval", "thinking_token_budget"),
    *("truncate_prompt_tokens", "truncation_side", "vllm_xargs", "web_search_options"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_NOT_OFFERED, ()),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),  # of a chat, whose template has them
    "bad_words": ([],),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "flat_logprobs": (False,),
    "functions": ([],),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "mm_payload": ("tensors",),
    "modalities": (["text"],),
    "n_probs": (0,),
    "output_mode": ("tokens",),
    "prompt_logprobs": (0,),
    "return_mm_kwargs": (False,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "watermarking": (False,),
}
"""Fields of OpenAI's and vLLM's APIs that are not offered, with the values that have no effect; null never has one."""


def is_text(value: Any) -> bool:
    """A string that can be encoded: JSON escapes can write half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def is_token(value: Any) -> bool:
    """A whole number that a tokenizer could have made."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def boolean(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(name, "must be true or false")
    return value


def integer(fields: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """A whole number within bounds."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise invalid(name, f"must be a whole number of at least {low}" + (f" and at most {high}" if high else ""))
    return value


def number(fields: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A number within bounds; NaN is refused."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise invalid(name, f"must be a number from {low:g} to {high:g}")
    return float(value)


def tokens(fields: Mapping[str, Any], name: str, most: int) -> tuple[int, ...]:
    """A list of token ids."""
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(is_token(i) for i in value) or len(value) > most:
        raise invalid(name, f"must be a list of at most {most} token ids")
    return tuple(value)


def text(fields: Mapping[str, Any], name: str, most: int = 512) -> str:
    """A short text; empty where it was left out."""
    value = fields.get(name)
    if value is None:
        return ""
    if not is_text(value) or len(value) > most:
        raise invalid(name, f"must be a text of at most {most} characters")
    return str(value)


def table(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object."""
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(name, "must be an object")
    return value
