"""The identity of samples: the model's weights, the prompts as token ids, and the decoding settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from e3rl.config import Config
from e3rl.evaluate.evaluation import round_sizes
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.types import Prompt

_PROBED = 4096  # values of each tensor that its digest reads: two trained models differ nearly everywhere


def weights_digest(model: Any) -> str:
    """A digest of names, shapes and evenly spread values of all parameters, adapters included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        probe = flat[:: max(1, flat.numel() // _PROBED)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(probe.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of ids, token ids and reference answers, in order; it changes with tokenizer, template and system prompt."""
    return _digest(json.dumps([p.problem.id, p.ids, p.problem.answer]) for p in prompts)


def problems_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of only ids and reference answers: the same for every model."""
    return _digest(json.dumps([p.problem.id, p.problem.answer]) for p in prompts)


def decoding(config: Config) -> dict[str, Any]:
    """The settings that decide what a plain sample is."""
    names: tuple[str, ...] = ("segment_length", "max_segments", "max_completion_length")
    if config.rollout.boundary != "length":
        names = (*names, "boundary", "boundary_level", "min_segment_length")
    rollout = {name: getattr(config.rollout, name) for name in names}
    sampling = {name: getattr(config.eval, name) for name in ("num_samples", "temperature", "top_p", "top_k")}
    return {
        "seed": config.run.seed,
        "dtype": config.model.dtype,
        "rounds": round_sizes(config),
        **rollout,
        **sampling,
        **_environments(config, "factory", "max_turns", "max_calls"),
    }


def _environments(config: Config, *names: str) -> dict[str, Any]:
    """Settings of the environment; none without one."""
    if not config.environments.factory:
        return {}
    return {"environments": {name: getattr(config.environments, name) for name in names}}


def _erasure(config: Config) -> dict[str, Any]:
    """The settings that decide what is erased, of segments and of turns."""
    turns = _environments(config, "erase", "erase_threshold", "max_turn_erasures", "state")
    return {**dataclasses.asdict(config.erasure), **turns}


def settings_digest(config: Config) -> str:
    """A short name for decoding settings, for a directory's name."""
    tables = {"decoding": decoding(config), "erasure": _erasure(config), "limit": config.eval.limit}
    return _digest([json.dumps(tables, sort_keys=True)])[:8]


def settings_of(config: Config) -> dict[str, Any]:
    """The part of an identity that is known before the model is loaded."""
    return {"decoding": decoding(config), "rewards": {"functions": list(config.rewards.functions)}}


def identity(
    model: Any,
    source: str,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    erase: bool,
    calibration: CalibrationStatistics | None,
) -> dict[str, Any]:
    """What `SampleStore.claim` compares; ``source`` is the name of the data."""
    found: dict[str, Any] = {
        "weights": weights_digest(model),
        "data": {
            "source": source,
            "problems": len(prompts),
            "prompts": prompts_digest(prompts),
            "answers": problems_digest(prompts),
        },
        **settings_of(config),
    }
    if erase:
        tables = json.dumps(calibration.to_tables(), sort_keys=True) if calibration else ""
        found["erasure"] = {**_erasure(config), "reference": _digest([tables])}
    return found
