"""The tap for vLLM's second model runner: requests have slots of vLLM's own, and nothing is read from the device.

`add_request` and `apply_staged_writes` fill the table before a step's forward pass. `apply`, inside the sampler, indexes it on
the device: which number a row draws with follows from its position, so vLLM may schedule the next step before this one's
tokens are known.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from e3rl.engine.vllm.arguments import VllmArguments
from e3rl.engine.vllm.table import SlotTable


class SecondRunnerTap(LogitsProcessor):
    """Draws every token of our requests."""

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
