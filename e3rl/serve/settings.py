"""From what a client asked for to the settings that its groups are decoded by."""

from __future__ import annotations

import dataclasses
import math
import secrets
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from e3rl.config import Config, ErasureConfig, RolloutConfig
from e3rl.errors import unknown
from e3rl.rollout.judge import needs_calibration
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.sections import build_section
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.messages import Chat
from e3rl.serve.requests import MIN_TEMPERATURE, DecodingRequest

MAX_ERASURES = 20
"""Largest erasure budget that a client may ask for: it multiplies the work of a request."""

_ROLLOUT = ("erase", "segment_length", "top_k")
_OWN = ("return_erased", "run_tools", "row")
_ERASURE = tuple(
    name
    for name, kind in typing.get_type_hints(ErasureConfig).items()
    if kind in (int, float) or typing.get_origin(kind) is Literal
)
"""Numbers and choices. A free string may name code to import, which is not a client's to choose."""

_METADATA = {f.name: f.metadata for kind in (RolloutConfig, ErasureConfig) for f in dataclasses.fields(kind)}
_SMALLEST, _LARGEST = MIN_TEMPERATURE, 1e6
_LIMITS = {"eta": 10.0, "delta": 10.0}
"""Largest values of exponents. Any other number may be up to `_LARGEST`: float32 arithmetic stays finite with it."""


@dataclass(frozen=True)
class RequestSettings:
    """How one request is decoded."""

    rollout: RolloutConfig
    erasure: ErasureConfig
    seed: int
    return_erased: bool


def runs_tools(request: DecodingRequest) -> bool:
    """Whether the server is to run tool calls (``e3rl.run_tools``); ApiError where that can't go with the rest."""
    asked = _flag(request.extension, "run_tools")
    if not asked:
        if "row" in request.extension:
            raise invalid("e3rl.row", "is for the server's own tools: send run_tools too")
        return False
    if not all(isinstance(prompt, Chat) for prompt in request.prompts):
        raise invalid("e3rl.run_tools", "only for POST /v1/chat/completions")
    output, plain = request.output, DecodingRequest("", ())
    others = {
        "tools": request.tools.tools,
        "stop": request.stop,
        "stop_token_ids": request.stop_ids,
        "logprobs": output.logprobs is not None,
        "return_token_ids": output.token_ids,
        "penalties, biases and grammars": request.shaping != plain.shaping,
    }
    for name, value in others.items():
        if value:
            raise invalid("e3rl.run_tools", f"can't be combined with {name}")
    return True


def decoding(
    request: DecodingRequest, config: Config, calibration: CalibrationStatistics | None, *, room: int
) -> RequestSettings:
    """The server's settings with the client's laid over them. ``room`` is what the prompt leaves of the context."""
    rollout, erasure = _extended(request.extension, config)
    greedy, limit = request.temperature == 0, _limit(request, rollout, room)
    top_k = 1 if greedy else _top_k(request, rollout)
    one = "temperature = 0" if greedy else "top_k = 1" if top_k == 1 else "min_p = 1" if request.min_p == 1 else ""
    if one and request.extension.get("erase") is True:
        field = one.partition(" ")[0]
        raise invalid(field, f"with {one} a redrawn segment is the same again; change it or leave e3rl.erase out")
    rollout = replace(
        rollout,
        erase=rollout.erase and not one,
        num_generations=request.n,
        temperature=rollout.temperature if greedy or request.temperature is None else request.temperature,
        top_k=top_k,
        top_p=_top_p(request, rollout),
        max_completion_length=limit,
        max_segments=math.ceil(limit / rollout.segment_length),
    )
    if rollout.erase:
        _require_statistics(rollout, erasure, calibration)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return RequestSettings(rollout, erasure, seed, _flag(request.extension, "return_erased"))


def _extended(extension: Mapping[str, Any], config: Config) -> tuple[RolloutConfig, ErasureConfig]:
    known = {*_ROLLOUT, *_OWN, *_ERASURE}
    for name in extension.keys() - known:
        raise ApiError(400, str(unknown("field of e3rl", name, known)), param=f"e3rl.{name}")
    for name, value in extension.items():
        _check_range(name, value)
    mine = {k: v for k, v in extension.items() if k in _ROLLOUT}
    theirs = {k: v for k, v in extension.items() if k in _ERASURE}
    rollout = build_section(RolloutConfig, {**dataclasses.asdict(config.rollout), **mine}, "e3rl")
    erasure = build_section(ErasureConfig, {**dataclasses.asdict(config.erasure), **theirs}, "e3rl")
    if erasure.max_erasures > max(MAX_ERASURES, config.erasure.max_erasures):
        raise invalid("e3rl.max_erasures", f"at most {MAX_ERASURES}")
    return rollout, erasure


def _check_range(name: str, value: Any) -> None:
    """Refuse numbers that no engine can calculate with: NaN, infinite, huge, or all but 0 where something is divided."""
    if name in _OWN or not isinstance(value, int | float) or isinstance(value, bool):
        return
    metadata = _METADATA[name]
    low = metadata["min"] if metadata["above"] is None else _SMALLEST
    low = -_LARGEST if low is None else low
    high = metadata["max"] or _LIMITS.get(name, _LARGEST)
    if not low <= value <= high:
        raise invalid(f"e3rl.{name}", f"must be from {low:g} to {high:g}")
    if name == "entropy_temperature" and 0 < value < _SMALLEST:
        raise invalid(f"e3rl.{name}", f"must be 0, or from {_SMALLEST:g} to {high:g}")


def _flag(extension: Mapping[str, Any], name: str) -> bool:
    value = extension.get(name, False)
    if not isinstance(value, bool):
        raise invalid(f"e3rl.{name}", "must be true or false")
    return value


def _top_k(request: DecodingRequest, rollout: RolloutConfig) -> int:
    if request.top_k is not None and request.extension.get("top_k", request.top_k) != request.top_k:
        raise invalid("top_k", "differs from e3rl.top_k; send one of them")
    return rollout.top_k if request.top_k is None else request.top_k


def _top_p(request: DecodingRequest, rollout: RolloutConfig) -> float:
    if request.top_p == 0:
        raise invalid("top_p", "must be above 0; for greedy decoding set temperature = 0")
    return rollout.top_p if request.top_p is None else request.top_p


def _limit(request: DecodingRequest, rollout: RolloutConfig, room: int) -> int:
    """Most tokens of a response: what the client asks for, or all that there is room for, within max_completion_length."""
    if room < 1 or (request.max_tokens or 0) > room:
        asked = f" and {request.max_tokens} more were asked for" if request.max_tokens else ""
        raise ApiError(
            400,
            f"the prompt leaves room for {max(room, 0)} tokens{asked}: shorten it or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return request.max_tokens or min(room, rollout.max_completion_length or room)


def _require_statistics(
    rollout: RolloutConfig, erasure: ErasureConfig, calibration: CalibrationStatistics | None
) -> None:
    """Say in the client's own terms what a single sample needs to be judged."""
    missing = calibration is None or not calibration.segments
    if missing and needs_calibration(rollout.num_generations, erasure):
        raise ApiError(
            400,
            f"n = {rollout.num_generations}: too few samples to set thresholds for each other, and the model has no "
            "calibration statistics ('e3rl calibrate' makes them). Ask for more samples with n, send "
            '"e3rl": {"erase": false} to decode plainly, or "e3rl": {"baseline": "static", "static_baseline": …}',
            code="no_reference_statistics",
        )
