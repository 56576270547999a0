"""What runs inside vLLM's workers: our sampler in place of vLLM's, and the measures that it takes.

The tap sees a step's logits [rows, V] where they are made. It draws each row's token with `e3rl.engine.sampling`, from the
random numbers that came with the request, and lifts that token's logit above all others; vLLM then takes the likeliest
token. So the tokens, entropies and perturbations are those of every other engine, and no row of logits leaves the worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import Samples, SamplingRows, sample

ARGUMENT = "e3rl"
"""The key of `SamplingParams.extra_args` under which a request carries what the tap needs."""


@dataclass(frozen=True)
class TapRequest:
    """A request as the tap sees it. ``generated`` is vLLM's own list, which grows as tokens are generated."""

    key: str
    numbers: np.ndarray
    sampling: Sampling
    generated: list[int]

    @classmethod
    def of(cls, params: SamplingParams, generated: list[int]) -> TapRequest | None:
        """None for a request that is not ours, such as those of vLLM's warm-up."""
        found = (params.extra_args or {}).get(ARGUMENT)
        if found is None:
            return None
        return cls(found["key"], np.frombuffer(found["numbers"]), Sampling(*found["sampling"]), generated)


def tap_arguments(key: str, numbers: np.ndarray, sampling: Sampling) -> dict[str, Any]:
    """What `TapRequest.of` reads, in types that survive the way to the worker."""
    return {ARGUMENT: {"key": key, "numbers": numbers.tobytes(), "sampling": list(astuple(sampling))}}


@dataclass(frozen=True)
class _Step:
    """One step's measures, still on the device. A row's place is its request's key and the token's position."""

    places: list[tuple[str, int]]
    samples: Samples


class Measured:
    """Measures that nobody has asked for yet. One per worker process."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._known: dict[str, dict[int, list[float]]] = {}

    def add(self, places: list[tuple[str, int]], samples: Samples) -> None:
        """Keep a step; nothing is moved off the device."""
        self._steps.append(_Step(places, samples))

    def take(self, finished: Iterable[str], open: Iterable[str]) -> dict[str, list[list[float]]]:
        """The measures of finished requests, token by token; what belongs to neither list is forgotten.

        A position that was drawn more than once (a prompt that ran in several chunks) keeps its last draw.
        """
        if self._steps:
            places = [place for step in self._steps for place in step.places]
            columns = zip(*(step.samples for step in self._steps), strict=True)
            for (key, position), measures in zip(places, Samples(*map(torch.cat, columns)).measures(), strict=True):
                self._known.setdefault(key, {})[position] = list(measures)
            self._steps = []
        taken = {key: self._known.pop(key, {}) for key in finished}
        self._known = {key: self._known[key] for key in open if key in self._known}
        return {key: [by_position[i] for i in sorted(by_position)] for key, by_position in taken.items()}


MEASURED = Measured()


class DrawTap(LogitsProcessor):
    """A logits processor of vLLM's first model runner: draws every token of our requests."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, TapRequest] = {}  # by row of the batch
        self._settings: SamplingRows | None = None  # of the rows in order; None: to be made again

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax: vLLM must apply it even where sampling is greedy."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows; in the order that vLLM prescribes."""
        if batch_update is None:
            return
        self._settings = None
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, generated in batch_update.added:
            self._put(index, TapRequest.of(params, generated))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            self._put(target, moved)
            if direction is MoveDirectionality.SWAP:
                self._put(source, replaced)

    def _put(self, index: int, request: TapRequest | None) -> None:
        if request is None:
            self._rows.pop(index, None)
        else:
            self._rows[index] = request

    def apply(self, logits: Tensor) -> Tensor:
        """Draw, measure, and leave the drawn token the likeliest."""
        if not self._rows:
            return logits
        rows, requests = list(self._rows), list(self._rows.values())
        if self._settings is None:
            self._settings = SamplingRows.of([r.sampling for r in requests], self._device)
        positions = [min(len(r.generated), len(r.numbers) - 1) for r in requests]
        numbers = [r.numbers[position] for r, position in zip(requests, positions, strict=True)]
        rows_S = torch.tensor(rows, device=self._device)
        samples = sample(logits[rows_S], self._settings, torch.tensor(numbers, device=self._device))
        MEASURED.add([(r.key, position) for r, position in zip(requests, positions, strict=True)], samples)
        # a row of NaN has no token; it gets any, and its measures, NaN too, tell the engine
        logits[rows_S, samples.ids_S.clamp(min=0)] = torch.inf
        return logits


class MeasuringWorker:
    """Mixed into vLLM's workers: the calls that the engine makes to all of them."""

    def take_measures(self, finished: list[str], open: list[str]) -> dict[str, list[list[float]]]:
        """See `Measured.take`."""
        return MEASURED.take(finished, open)
