"""What the versions of vLLM run of ours whose insides are known: a scheduler that parks requests, and workers that take new
weights from shared memory.

A request of ours is parked when it ends: its blocks are kept under its key. The request that goes on from there names that
key. It gets the blocks of all tokens that both have in common but the last one of its own, whose logits it needs: so one
token runs through the model again, whether the segment before was kept or erased. The blocks behind those are freed.

Parking is a favour: where vLLM has no block left, parked requests give theirs back, the oldest first, before anybody is
preempted or has to wait. What goes on from one of those finds its prefix in vLLM's prefix cache or computes it again. So
parked requests can block nobody.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from e3rl.engine.vllm.table import ARGUMENT, MeasuringWorker, VllmArguments
from e3rl.weights.vllm import BACKEND
from e3rl.weights.vllm_worker import SharedMemoryWeights


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


SECONDS_TO_END = 20.0
"""How long a process of vLLM's may take to end by itself after the one that started it has gone."""


def end_with_parent(kind: str) -> None:
    """End this process of vLLM's when the one that started it is gone: it would keep its device for ever.

    Nothing where the process is not of that kind: vLLM may run in its client's own.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(kind):
        return

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_END)
        os._exit(1)  # what it started sees that and ends too

    threading.Thread(target=watch, daemon=True).start()


class ParkingScheduler(Scheduler):
    """The scheduler of a vLLM that waits for a step's tokens before it schedules the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parking = Parking(self.kv_cache_manager, self.kv_cache_config)
        self._unsaid: dict[str, Any] = {}  # the output of a request of ours that is under way
        end_with_parent("EngineCore")

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


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeights)


class TransferringWorker(MeasuringWorker):
    """`MeasuringWorker` in a process that knows our way for weights: naming it brings this module there."""

    def end_with_engine(self) -> None:
        """Called once: a worker that hangs when its engine is killed ends nevertheless."""
        end_with_parent("VllmWorker")
