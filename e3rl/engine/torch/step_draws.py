"""The tokens of the next few steps for rows that are decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from e3rl.engine.requests import Request
from e3rl.engine.sampling import NON_FINITE, Samples, SamplingRows, sample
from e3rl.errors import NonFiniteLogits


class StepDraws:
    """The next ``steps`` draws of some requests, with settings and random numbers on the device beforehand.

    What is drawn and measured stays on the device until `deliver` hands it to the requests, for all steps at once. Logits
    come with ``spare`` rows more than there are requests; those are drawn for nobody.
    """

    def __init__(self, requests: Sequence[Request], steps: int, spare: int, device: torch.device) -> None:
        self._requests = requests
        drawn = [*requests, *[requests[0]] * spare]
        self._settings = SamplingRows.of([request.sampling for request in drawn], device)
        numbers_ST = np.stack([r.uniforms[len(r.ids) : len(r.ids) + steps] for r in drawn])
        self._numbers_TS = torch.from_numpy(numbers_ST.T.copy()).to(device)
        self._samples: list[Samples] = []
        self._ids: list[list[int]] = []

    @property
    def ids_R(self) -> Tensor:
        """The tokens of the latest step, spare rows included."""
        return self._samples[-1].ids_S

    def sample(self, logits_RV: Tensor) -> list[int]:
        """One token per request; raises NonFiniteLogits, and draws for nobody, where a request's logits are not all finite."""
        samples = sample(logits_RV, self._settings, self._numbers_TS[len(self._samples)])
        ids: list[int] = samples.ids_S.tolist()
        ids = ids[: len(self._requests)]
        if NON_FINITE in ids:
            raise NonFiniteLogits(self._requests[ids.index(NON_FINITE)].draw)
        self._samples.append(samples)
        self._ids.append(ids)
        return ids

    def deliver(self) -> int:
        """Give the requests their tokens and measures; how many tokens that is."""
        if not self._samples:
            return 0
        together = Samples(*(torch.stack(field, 1).flatten() for field in zip(*self._samples, strict=True))).measures()
        steps = len(self._ids)
        for index, (request, ids) in enumerate(zip(self._requests, zip(*self._ids, strict=True), strict=True)):
            request.ids += ids
            request.measures += together[index * steps : (index + 1) * steps]
        return steps * len(self._requests)
