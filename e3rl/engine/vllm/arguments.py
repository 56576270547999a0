"""What a request of ours carries in `SamplingParams.extra_args`, for vLLM's workers and its scheduler. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from e3rl.engine.protocol import Sampling

ARGUMENT = "e3rl"
"""The key of `SamplingParams.extra_args`."""


@dataclass(frozen=True)
class VllmArguments:
    """A request's name, its random numbers, how it samples, and the ended request that it goes on from ('': none)."""

    key: str
    numbers: np.ndarray
    sampling: Sampling
    continues: str = ""

    def packed(self) -> dict[str, Any]:
        """What `read` reads, in types that survive the way to the worker."""
        return {
            ARGUMENT: {
                "key": self.key,
                "numbers": self.numbers.tobytes(),
                "sampling": list(astuple(self.sampling)),
                "continues": self.continues,
            }
        }

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> VllmArguments | None:
        """None for a request that is not ours, such as those of vLLM's warm-up."""
        found = (extra_args or {}).get(ARGUMENT)
        if found is None:
            return None
        numbers = np.frombuffer(found["numbers"])
        return cls(found["key"], numbers, Sampling(*found["sampling"]), found["continues"])
