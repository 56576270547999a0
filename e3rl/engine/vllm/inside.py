"""What vLLM runs of ours in its own processes: the taps of both model runners, and the scheduler that parks requests.

A request of ours is parked when it ends: its blocks are kept under its key. The request that goes on from there names that
key. It gets the blocks of all tokens that both have in common but the last one of its own, whose logits it needs: so one
token runs through the model again, whether the segment before was kept or erased. The blocks behind those are freed.

Parking is a favour: where vLLM has no block left, parked requests give theirs back, the oldest first, before anybody is
preempted or has to wait. What goes on from one of those finds its prefix in vLLM's prefix cache or computes it again. So
parked requests can block nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from e3rl.engine.vllm.table import ARGUMENT, SlotTable, VllmArguments

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


@dataclass(frozen=True)
class Parked:
    """A request that ended: its tokens, of which the first ``computed`` have keys and values in ``blocks``."""

    tokens: Sequence[int]
    computed: int
    blocks: list[Any]
    salt: str | None


class Parking:
    """The parked requests of one cache. Stands before ``manager``: who asks that for blocks asks here."""

    def __init__(self, manager: KVCacheManager, config: KVCacheConfig) -> None:
        groups = config.kv_cache_groups
        # a block of a window or of a recurrent state is not what it was when its tokens were drawn
        self.possible = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        self._parked: dict[str, Parked] = {}
        self._manager, self._pool = manager, manager.block_pool
        self._find, self._allocate = manager.get_computed_blocks, manager.allocate_slots
        if self.possible:
            self._books = manager.coordinator.single_type_managers[0]
            manager.get_computed_blocks = self.get_computed_blocks
            manager.allocate_slots = self.allocate_slots

    def __len__(self) -> int:
        return len(self._parked)

    def park(self, request: Request, key: str) -> None:
        """Take the blocks of a request that ended."""
        blocks = self._manager.pop_blocks_for_free(request)
        tokens = list(request.all_token_ids)
        # no keys yet: the token that was drawn last, and what was scheduled before the end was known
        computed = min(request.num_computed_tokens, len(tokens) - 1)
        self._parked[key] = Parked(tokens, computed, blocks, request.cache_salt)

    def give_up(self, key: str) -> None:
        """Free what is held under the key, last blocks first. Full ones can still be found by their hashes."""
        found = self._parked.pop(key, None)
        if found is not None:
            self._pool.free_blocks(reversed(found.blocks))

    def give_up_all(self) -> None:
        """Free everything that is held."""
        for key in list(self._parked):
            self.give_up(key)

    def get_computed_blocks(self, request: Request) -> tuple[Any, ...]:
        """As the manager's; for a request that goes on from a parked one, the tokens in that one's blocks."""
        found = self._find(request)
        parked = self._parent(request)
        if parked is None:
            return found
        tokens = self._in_common(request, parked)
        return (self._manager.empty_kv_cache_blocks, tokens, 0) if tokens > found[1] else found

    def _parent(self, request: Request) -> Parked | None:
        """The parked request that this one goes on from, if its keys are of the same weights."""
        arguments = VllmArguments.read(request.sampling_params.extra_args)
        parked = self._parked.get(arguments.continues) if arguments else None
        return parked if parked is not None and parked.salt == request.cache_salt else None

    def _in_common(self, request: Request, parked: Parked) -> int:
        """Tokens whose keys the request can use; not in a block that it would write to while others read it."""
        tokens = min(_in_common(parked.tokens, request.all_token_ids), parked.computed, request.num_tokens - 1)
        whole, rest = divmod(tokens, self._books.block_size)
        if rest and parked.blocks[whole].ref_cnt > 1 and not _is_hashed_as(parked.blocks[whole], request, whole):
            return tokens - rest
        return tokens

    def allocate_slots(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, **others: Any
    ) -> KVCacheBlocks | None:
        """As the manager's; where blocks are missing, parked requests give theirs back, that of this request last."""
        used = 0
        if num_new_computed_tokens and others.get("new_computed_blocks") is self._manager.empty_kv_cache_blocks:
            used = self._move_in(request, num_new_computed_tokens)
        arguments = VllmArguments.read(request.sampling_params.extra_args)
        parent = arguments.continues if arguments and arguments.continues in self._parked else ""
        while True:
            blocks = self._allocate(request, num_new_tokens, num_new_computed_tokens, **others)
            if blocks is not None or not self._give_way(parent, used):
                break
        if blocks is not None and parent:
            self._pool.free_blocks(reversed(self._parked.pop(parent).blocks[used:]))
        elif blocks is None and used:
            del self._books.req_to_blocks[request.request_id], self._books.num_cached_block[request.request_id]
        if blocks is None and not others.get("has_scheduled_reqs", True):
            self.give_up(parent)  # there is nobody to wait for: the next try has all blocks
        return blocks

    def _move_in(self, request: Request, tokens: int) -> int:
        """Give the request its blocks of the parked one, which holds them too until all is allocated; how many they are.

        The last one may be full of tokens that are not the request's: then it loses the name that the prefix cache has for it.
        """
        parked = self._parent(request)
        assert parked is not None
        blocks = parked.blocks[: -(-tokens // self._books.block_size)]
        named = 0
        while named < len(blocks) and _is_hashed_as(blocks[named], request, named):
            named += 1
        for block in blocks[named:]:
            self._pool._maybe_evict_cached_block(block)
        self._books.req_to_blocks[request.request_id] = list(blocks)
        self._books.num_cached_block[request.request_id] = named
        return len(blocks)

    def _give_way(self, parent: str, used: int) -> bool:
        """Free what the oldest parked request holds; at last those of ``parent``'s blocks that are not ``used``."""
        oldest = next((key for key in self._parked if key != parent), None)
        if oldest is not None:
            self.give_up(oldest)
            return True
        if not parent or not used or used == len(self._parked[parent].blocks):
            return False
        found, held = self._parked[parent], used * self._books.block_size
        self._pool.free_blocks(reversed(found.blocks[used:]))
        self._parked[parent] = replace(found, blocks=found.blocks[:used], computed=min(found.computed, held))
        return True


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])


def _is_hashed_as(block: Any, request: Request, index: int) -> bool:
    """Whether the block's name in the prefix cache says that it holds the request's own tokens."""
    return (
        block.block_hash is not None
        and index < len(request.block_hashes)
        and get_block_hash(block.block_hash) == request.block_hashes[index]
    )


class ParkingScheduler(Scheduler):
    """The scheduler of a vLLM that waits for a step's tokens before it schedules the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parking = Parking(self.kv_cache_manager, self.kv_cache_config)
        self._unsaid: dict[str, Any] = {}  # the output of a request of ours that is under way

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """As vLLM's; a request of ours says all it has drawn when it ends, in one message."""
        found = super().update_from_output(*args, **kwargs)
        for outputs in found.values():
            outputs.outputs = [output for output in outputs.outputs if self._is_said(output)]
        return {client: o for client, o in found.items() if o.outputs or o.scheduler_stats or o.finished_requests}

    def _is_said(self, output: Any) -> bool:
        """Whether the output goes out; it then has what its request drew before."""
        key, request = output.request_id, self.requests.get(output.request_id)
        before = self._unsaid.pop(key, None)
        if before is not None:
            output.new_token_ids = before.new_token_ids + output.new_token_ids
            output.prefill_stats = output.prefill_stats or before.prefill_stats
        if request is None or ARGUMENT not in (request.sampling_params.extra_args or {}):
            return True
        self._unsaid[key] = output
        return False

    def _free_blocks(self, request: Request) -> None:
        arguments = VllmArguments.read(request.sampling_params.extra_args) if request.sampling_params else None
        ended = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        if arguments is not None and ended and self.parking.possible:
            self.parking.park(request, arguments.key)
        super()._free_blocks(request)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> Any:
        """As vLLM's; parked requests may be among them, by their keys."""
        if request_ids is None:
            self.parking.give_up_all()
            self._unsaid.clear()
        for key in [request_ids] if isinstance(request_ids, str) else list(request_ids or ()):
            self.parking.give_up(key)
            self._unsaid.pop(key, None)
        return super().finish_requests(request_ids, finished_status)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM's; keys of parked requests are of the old weights too."""
        self.parking.give_up_all()
        return super().reset_prefix_cache(*args, **kwargs)


class AsyncParkingScheduler(ParkingScheduler, AsyncScheduler):
    """The scheduler of a vLLM that schedules a step while the one before runs."""
