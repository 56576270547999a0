"""The taps inside vLLM's samplers, one for each of its model runners: they draw the tokens of our requests, and measure them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from e3rl.engine.vllm.table import SlotTable, VllmArguments

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as SlotLogitsProcessor
except ImportError:  # of the older supported versions, where the first model runner is asked for
    SlotLogitsProcessor = object

_Row = tuple[int, list[int]]
"""The slot of a row's request, and its generated tokens: vLLM's own list, which grows."""


class FirstRunnerTap(LogitsProcessor):
    """The tap of vLLM's first model runner, the one that runs everywhere.

    Draws every token of our requests. This runner moves requests between rows, so slots are given out here.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        slots = vllm_config.scheduler_config.max_num_seqs
        self._device = device
        self._table = SlotTable(slots, vllm_config.model_config.get_vocab_size(), device)
        self._free = list(range(slots))
        self._rows: dict[int, _Row] = {}
        self._slots: tuple[np.ndarray, Tensor] | None = None  # of the rows in order; None: to be made again

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax: vLLM must apply it even where sampling is greedy."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows; in the order that vLLM prescribes."""
        if batch_update is None:
            return
        self._slots = None
        for index in batch_update.removed:
            self._forget(index)
        for index, params, _, generated in batch_update.added:
            self._forget(index)
            request = VllmArguments.read(params.extra_args)
            if request is not None:
                slot = self._free.pop(0)
                self._table.add(slot, request)
                self._rows[index] = slot, generated
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if direction is not MoveDirectionality.SWAP and replaced is not None:
                self._free.append(replaced[0])
                replaced = None
            for index, row in ((target, moved), (source, replaced)):
                if row is not None:
                    self._rows[index] = row
        self._table.flush()

    def _forget(self, index: int) -> None:
        before = self._rows.pop(index, None)
        if before is not None:
            self._free.append(before[0])

    def apply(self, logits: Tensor) -> Tensor:
        """See `SlotTable.draw`."""
        if not self._rows:
            return logits
        rows = range(len(logits))
        if self._slots is None:
            slots = np.array([self._rows[i][0] if i in self._rows else self._table.nobody for i in rows])
            self._slots = slots, torch.from_numpy(slots).to(self._device)
        positions = [len(self._rows[i][1]) if i in self._rows else 0 for i in rows]
        return self._table.draw(logits, self._slots[1], self._slots[0], torch.tensor(positions, device=self._device))


class SecondRunnerTap(SlotLogitsProcessor):
    """The tap of vLLM's second model runner, where requests have slots of vLLM's own. A step reads nothing from the device.

    `add_request` and `apply_staged_writes` fill the table before a step's forward pass. `apply`, inside the sampler, indexes it
    on the device: which number a row draws with follows from its position, so vLLM may schedule the next step before this
    one's tokens are known.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if vllm_config.speculative_config is not None:
            raise RuntimeError("a drafted token is drawn by vLLM and not by e3rl: run without speculative decoding")
        self._prompt_lengths = req_states.prompt_len
        self._table = SlotTable(req_states.max_num_reqs, req_states.vocab_size, req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Stage the request's numbers and settings; whether it is ours."""
        return self._table.add(req_idx, VllmArguments.read(sampling_params.extra_args))

    def apply_staged_writes(self) -> None:
        """See `SlotTable.flush`."""
        self._table.flush()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """See `SlotTable.draw`."""
        slots_S = ctx.expanded_idx_mapping
        positions_S = ctx.pos + 1 - self._prompt_lengths.gpu[slots_S]
        return self._table.draw(logits, slots_S.long(), ctx.idx_mapping_np, positions_S.long())
