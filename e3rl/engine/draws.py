"""Random numbers that depend on the name of a draw and on nothing else (spec: fresh draws, reproducible rollouts)."""

from __future__ import annotations

import hashlib

import numpy as np

from e3rl.types import Draw

_PERSON = b"e3rl-draw"


def draw_key(draw: Draw) -> int:
    """The draw's 128-bit key. The free text comes last, so that no two draws share an encoding."""
    fields = (draw.seed, draw.step, draw.sibling, draw.segment, draw.attempt, draw.prompt_id)
    encoded = "|".join(map(str, fields)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=16, person=_PERSON).digest(), "little")


def uniforms(draw: Draw, n: int) -> np.ndarray:
    """The first ``n`` numbers of the draw's stream: float64, uniform in [0, 1).

    A longer stream starts with the shorter one. The raw bits of the counter-based generator are turned into floats
    here, since numpy promises to keep the former for ever and not the latter.
    """
    raw = np.random.Philox(key=draw_key(draw)).random_raw(n)
    return (raw >> np.uint64(11)) * 2.0**-53
