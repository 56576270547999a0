"""What our requests carry into vLLM, and the tap's memory there: numbers, settings and measures by slot. Needs no vLLM.

The tap sees a step's logits [S, V] where they are made. It draws each row's token with `e3rl.engine.sampling`, from the
random numbers that came with the request, and lifts that token's logit above all others; vLLM then takes the likeliest
token. So the tokens, entropies and perturbations are those of every other engine, and no row of logits leaves the worker.
Drawing reads nothing from the device and copies nothing to it.

Shapes: N slots, L tokens of the longest request so far, S rows, V vocabulary; 5 are the columns of `Samples.measures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import Samples, SamplingRows, sample

ARGUMENT = "e3rl"
"""The key of `SamplingParams.extra_args`."""


WIDTH = len(Samples._fields) - 1  # without the ids
_RANK = WIDTH - 1  # the last column: at least 1 of a token that was drawn; 0: none was


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


class SlotTable:
    """Requests by slot. Slots are used again: what was measured of a request is kept until it is taken or forgotten.

    One more slot than asked for is nobody's. A worker process has one table, `of_worker`.
    """

    of_worker: ClassVar[SlotTable]

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self.nobody, slots = slots, slots + 1
        self._vocabulary, self._device = vocabulary, device
        self._numbers_NL = torch.zeros(slots, 1, dtype=torch.float64, device=device)
        self._measured_NL5 = torch.zeros(slots, 1, WIDTH, device=device)
        self._limits_N = torch.zeros(slots, dtype=torch.long, device=device)  # tokens of the request; 0: not ours
        self._sampling = [Sampling()] * slots
        self._rows = SamplingRows.of(self._sampling, device)
        self._requests: dict[int, VllmArguments | None] = {}  # by slot
        self._slots: dict[str, int] = {}  # by key
        self._kept: dict[str, Tensor] = {}  # measures of requests whose slot has another one now
        self._staged: set[int] = set()
        SlotTable.of_worker = self

    def add(self, slot: int, request: VllmArguments | None) -> bool:
        """A request has come to the slot, or come back after it was preempted; whether it is ours."""
        before = self._requests.get(slot)
        if before is not None and self._slots.get(before.key) == slot:
            self._kept[before.key] = self._measured_NL5[slot, : len(before.numbers)].clone()
            del self._slots[before.key]
        self._requests[slot] = request
        self._staged.add(slot)
        return request is not None

    def flush(self) -> None:
        """Bring what was added to the device; before the step's forward pass."""
        if not self._staged:
            return
        staged, self._staged = sorted(self._staged), set()
        added = [(slot, request) for slot in staged if (request := self._requests[slot]) is not None]
        self._widen(max((len(r.numbers) for _, r in added), default=0))
        numbers = np.zeros((len(staged), self._numbers_NL.shape[1]))
        limits = np.zeros(len(staged), np.int64)
        places = {slot: i for i, slot in enumerate(staged)}
        for slot, request in added:
            numbers[places[slot], : len(request.numbers)] = request.numbers
            limits[places[slot]] = len(request.numbers)
            self._sampling[slot] = request.sampling
        index = torch.tensor(staged, device=self._device)
        self._numbers_NL[index] = torch.from_numpy(numbers).to(self._device)
        self._limits_N[index] = torch.from_numpy(limits).to(self._device)
        self._rows = SamplingRows.of(self._sampling, self._device)
        known = {request.key: self._measured(request) for _, request in added}
        self._measured_NL5[index] = 0.0
        for slot, request in added:
            if (measured := known[request.key]) is not None:
                self._measured_NL5[slot, : len(measured)] = measured
            self._kept.pop(request.key, None)
            self._slots[request.key] = slot

    def _measured(self, request: VllmArguments) -> Tensor | None:
        """What was measured of a request that was preempted."""
        if request.key in self._kept:
            return self._kept[request.key]
        slot = self._slots.get(request.key)
        return None if slot is None else self._measured_NL5[slot, : len(request.numbers)].clone()

    def _widen(self, tokens: int) -> None:
        missing = tokens - self._numbers_NL.shape[1]
        if missing > 0:
            self._numbers_NL = torch.nn.functional.pad(self._numbers_NL, (0, missing))
            self._measured_NL5 = torch.nn.functional.pad(self._measured_NL5, (0, 0, 0, missing))

    def draw(self, logits_SV: Tensor, slots_S: Tensor, slots: np.ndarray, positions_S: Tensor) -> Tensor:
        """Draw, measure, and leave the drawn token the likeliest. ``slots`` is ``slots_S`` on the host; positions count a
        request's generated tokens, and are below 0 while its prompt is not complete. Rows that are not ours stay."""
        if logits_SV.shape[1] < self._vocabulary:
            raise RuntimeError(
                f"a worker sees {logits_SV.shape[1]} of {self._vocabulary} logits: entropies and draws need all of them. Use "
                "rollout.vllm_tensor_parallel_size = 1, or settings under which vLLM gathers logits in every worker"
            )
        limits_S = self._limits_N[slots_S]
        ours_S = (positions_S >= 0) & (positions_S < limits_S)
        places_S = positions_S.clamp(min=0).minimum((limits_S - 1).clamp(min=0))
        samples = sample(logits_SV, self._settings(slots_S, slots), self._numbers_NL[slots_S, places_S])
        measured_S5 = torch.stack([field.float() for field in samples[1:]], dim=1)
        before_S5 = self._measured_NL5[slots_S, places_S]
        self._measured_NL5[slots_S, places_S] = torch.where(ours_S.unsqueeze(1), measured_S5, before_S5)
        # a row of NaN has no token; it gets any, and its measures, NaN too, tell the engine
        ids_S1 = samples.ids_S.clamp(min=0).unsqueeze(1)
        lifted_S1 = torch.where(ours_S.unsqueeze(1), torch.inf, logits_SV.gather(1, ids_S1))
        return logits_SV.scatter_(1, ids_S1, lifted_S1.to(logits_SV.dtype))

    def _settings(self, slots_S: Tensor, slots: np.ndarray) -> SamplingRows:
        """The rows' settings; what decides about work is known without the device."""
        host = SamplingRows.of([self._sampling[slot] for slot in slots], "cpu")
        return replace(
            self._rows.part(slots_S),
            depth=host.depth,
            any_min_p=host.any_min_p,
            any_truncated_entropy=host.any_truncated_entropy,
            any_measured_apart=host.any_measured_apart,
        )

    def take(self, finished: Sequence[tuple[str, int]], forgotten: Iterable[str]) -> bytes:
        """Measures of finished requests, of so many tokens each, one behind the other: float32 [tokens, 5], read at once.

        All 0 where another worker drew. What is ``forgotten`` is dropped.
        """
        found = [torch.zeros(0, WIDTH, device=self._device)]
        for key, tokens in finished:
            slot = self._slots.get(key)
            measured = self._kept.get(key) if slot is None else self._measured_NL5[slot]
            found.append(torch.zeros(tokens, WIDTH, device=self._device) if measured is None else measured[:tokens])
        content: bytes = torch.cat(found).cpu().numpy().tobytes()
        for key in (*(key for key, _ in finished), *forgotten):
            self._slots.pop(key, None)
            self._kept.pop(key, None)
        return content


def merged_measures(workers: Sequence[bytes]) -> np.ndarray:
    """What the workers measured, as [tokens, 5]: each row by one that drew it. Some workers may have sent nothing."""
    arrays = [np.frombuffer(content, np.float32).reshape(-1, WIDTH) for content in workers if content]
    whole = arrays[0]
    for other in arrays[1:]:
        whole = np.where(whole[:, _RANK:] > 0, whole, other)
    return whole


class MeasuringWorker:
    """Mixed into vLLM's workers: the calls that the engine makes to all of them.

    Under tensor parallelism every worker has all logits and draws every row, so the first one answers. Where vLLM divides
    the rows among its workers, each answers for those that it drew.
    """

    rank: int  # vLLM's workers have these
    parallel_config: Any

    def take_measures(self, finished: Sequence[tuple[str, int]], forgotten: Sequence[str]) -> bytes:
        """See `SlotTable.take`; nothing from a worker that drew what the first one drew."""
        if self.rank and not getattr(self.parallel_config, "enable_batch_sharded_sampling", False):
            return SlotTable.of_worker.take([], [*(key for key, _ in finished), *forgotten])
        return SlotTable.of_worker.take(finished, forgotten)
