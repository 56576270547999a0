"""vLLM's own scheduler without a model: a worker that keeps, instead of keys and values, which tokens each slot is of.

Rows are siblings of groups: they draw segments, keep or erase them, wait for each other, are cancelled. What they draw is a
function of the tokens before and the draw's name, so it must not depend on who is preempted, parked or gives way.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_block_hash, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from e3rl.engine.protocol import Sampling
from e3rl.engine.vllm.core import precedence
from e3rl.engine.vllm.inside import AsyncParkingScheduler, ParkingScheduler
from e3rl.engine.vllm.table import VllmArguments
from e3rl.types import Draw

BLOCK, VOCABULARY, EOS = 4, 50, 1


def prefix_name(ids: tuple[int, ...], salt: str) -> int:
    """A number that no other prefix has; what stands in a slot in place of keys and values."""
    content = f"{salt}{ids}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class World:
    """Sizes and habits of one random schedule."""

    seed: int
    asynchronous: bool
    blocks: int  # of the cache
    rows: int  # that run at once
    budget: int  # tokens of a step
    groups: int
    siblings: int
    segments: int
    length: int  # of a segment
    prompt: int
    erase: float
    end: float
    cancel: float
    twins: bool = False  # pairs of siblings draw and judge the same, so that they can find each other's blocks

    @property
    def longest(self) -> int:
        return self.prompt + self.segments * self.length

    @classmethod
    def random(cls, seed: int) -> World:
        rng = random.Random(seed)
        segments, length, prompt = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 14)
        one = -(-(prompt + segments * length) // BLOCK)  # blocks of the longest row
        return cls(
            seed=seed,
            asynchronous=rng.random() < 0.5,
            blocks=1 + one + rng.choice([0, 0, 1, 2, 5, 12, 40]),  # one is vLLM's own
            rows=rng.randint(1, 8),
            budget=rng.choice([8, 16, 64]),
            groups=rng.randint(1, 3),
            siblings=rng.randint(1, 4),
            segments=segments,
            length=length,
            prompt=prompt,
            erase=rng.choice([0.0, 0.3, 0.6]),
            end=rng.choice([0.0, 0.05, 0.2]),
            cancel=rng.choice([0.0, 0.0, 0.1]),
            twins=rng.random() < 0.5,
        )


class StandInWorker:
    """Slots of tokens, checked whenever they are read."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.slots: dict[tuple[int, int], int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.params: dict[str, VllmArguments] = {}
        self.names: dict[int, tuple[int, ...]] = {}  # the tokens behind what a slot holds

    def execute(self, scheduled: Any) -> ModelRunnerOutput:
        """One step: every token that is scheduled reads the slots before it and writes its own."""
        for key in scheduled.finished_req_ids:
            for held in (self.tokens, self.blocks, self.params, self.prompts):
                held.pop(key, None)
        starts = {}
        for new in scheduled.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.prompts[new.req_id] = len(new.prompt_token_ids)
            self.blocks[new.req_id] = list(new.block_ids[0])
            self.params[new.req_id] = VllmArguments.read(new.sampling_params.extra_args)
            starts[new.req_id] = new.num_computed_tokens
        known = scheduled.scheduled_cached_reqs
        for key, blocks, start in zip(known.req_ids, known.new_block_ids, known.num_computed_tokens, strict=True):
            if key in known.resumed_req_ids:
                self.blocks[key] = []
            self.blocks[key] += blocks[0] if blocks is not None else []
            starts[key] = start
        drawn = {}
        for key, count in scheduled.num_scheduled_tokens.items():
            self._write(key, starts[key], count)
        for key, count in scheduled.num_scheduled_tokens.items():
            drawn[key] = self._draw(key, starts[key] + count)
        keys = list(drawn)
        return ModelRunnerOutput(keys, {key: i for i, key in enumerate(keys)}, [drawn[key] for key in keys])

    def _write(self, key: str, start: int, count: int) -> None:
        tokens, blocks = self.tokens[key], self.blocks[key]
        for position in range(start, start + count):
            slot, ids = (blocks[position // BLOCK], position % BLOCK), tuple(tokens[: position + 1])
            self.slots[slot] = prefix_name(ids, self.salt)
            self.names[self.slots[slot]] = ids

    def _draw(self, key: str, end: int) -> list[int]:
        """The next token, where all before it have run; after a look at every slot that it depends on."""
        tokens, blocks = self.tokens[key], self.blocks[key]
        for position in range(end):
            slot = blocks[position // BLOCK], position % BLOCK
            expected = prefix_name(tuple(tokens[: position + 1]), self.salt)
            assert self.slots.get(slot) == expected, f"request {key} reads other tokens at {position} of {end}"
        if end < len(tokens):
            return []
        tokens.append(next_token(tuple(tokens), self.params[key], len(tokens) - self.prompts[key]))
        return [tokens[-1]]


def next_token(ids: tuple[int, ...], arguments: VllmArguments, position: int) -> int:
    """What is drawn after these tokens with the request's number for the position."""
    if arguments.numbers[position] < arguments.sampling.top_p - 0.5:  # the share of ends, smuggled in here
        return EOS
    return 2 + prefix_name((*ids, int(arguments.numbers[position] * 2**30)), "") % (VOCABULARY - 2)


@dataclass
class Sibling:
    """A row: its tokens, and the request that ended last."""

    name: str
    ids: list[int]
    start: int = 0  # tokens before the segment that is being drawn
    segment: int = 0
    attempt: int = 0
    parked: str = ""
    open: str = ""
    waiting: bool = False  # for the others of its group
    done: bool = False
    drawn: list[tuple[int, ...]] = field(default_factory=list)


class Schedule:
    """Plays a world on a scheduler; `play` returns what was drawn by sibling."""

    def __init__(self, world: World, model: Path) -> None:
        self.world, self.rng = world, random.Random(world.seed + 1)
        self.scheduler = make_scheduler(world, model)
        self.worker = StandInWorker("")
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.groups = [[self._sibling(g, s) for s in range(world.siblings)] for g in range(world.groups)]
        self.by_key: dict[str, tuple[int, Sibling]] = {}
        self.count = self.steps = self.preempted = self.gave_way = 0
        self.commits: list[int] = []  # tokens run again
        self.erasures: list[int] = []

    def _sibling(self, group: int, number: int) -> Sibling:
        prompt = prompt_of(self.world, group)
        return Sibling(f"{group}.{number}", prompt, start=len(prompt))

    def play(self) -> dict[str, list[tuple[int, ...]]]:
        for number, group in enumerate(self.groups):
            for sibling in group:
                self._extend(number, sibling)
        flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        idle = 0
        while any(not sibling.done for group in self.groups for sibling in group):
            if len(flight) < 1 + self.world.asynchronous:
                scheduled = self.scheduler.schedule()
                self.preempted += len(scheduled.preempted_req_ids or ())
                flight.append((scheduled, self.worker.execute(scheduled)))
                if len(flight) < 1 + self.world.asynchronous and scheduled.total_num_scheduled_tokens:
                    continue
            scheduled, output = flight.popleft()
            idle = 0 if scheduled.total_num_scheduled_tokens else idle + 1
            assert idle < 8, "nothing is scheduled and nothing waits for anything: a deadlock"
            self.steps += 1
            assert self.steps < 20_000
            self._finished(self.scheduler.update_from_output(scheduled, output))
            if self.steps % 8 == 0:
                assert not self.stale_names()
            self._maybe_cancel()
        while flight:
            self.scheduler.update_from_output(*flight.popleft())
        return {s.name: s.drawn for group in self.groups for s in group}

    def stale_names(self) -> int:
        """Blocks whose name in the prefix cache says something else than what is in them, of those that somebody could find."""
        stale = 0
        for block in self.scheduler.kv_cache_manager.block_pool.blocks:
            if block.block_hash is None:
                continue
            ids = self.worker.names[self.worker.slots[block.block_id, BLOCK - 1]]
            params = SamplingParams(max_tokens=1)
            named = Request("", list(ids), params, None, block_hasher=self.hasher).block_hashes[-1]
            stale += len(ids) % BLOCK > 0 or get_block_hash(block.block_hash) != named
        return stale

    def _extend(self, number: int, sibling: Sibling) -> None:
        world, key = self.world, f"r{self.count}"
        self.count += 1
        arguments = arguments_of(world, sibling.name, sibling.segment, sibling.attempt, key, sibling.parked)
        params = SamplingParams(
            max_tokens=world.length,
            ignore_eos=True,
            stop_token_ids=[EOS],
            detokenize=False,
            temperature=0.0,
            extra_args=arguments.packed(),
        )
        request = Request(
            key,
            list(sibling.ids),
            params,
            None,
            arrival_time=float(self.count),
            priority=precedence(Draw(0, 0, sibling.name, 0, sibling.segment, sibling.attempt)),
            block_hasher=self.hasher,
        )
        sibling.open = key
        self.by_key[key] = number, sibling
        self.scheduler.add_request(request)

    def _finished(self, outputs: Any) -> None:
        for output in (o for outs in outputs.values() for o in outs.outputs):
            number, sibling = self.by_key[output.request_id]
            if sibling.open != output.request_id:
                continue
            sibling.ids += output.new_token_ids
            if output.prefill_stats is not None and sibling.parked:
                again = output.prefill_stats.num_prompt_tokens - output.prefill_stats.num_cached_tokens
                (self.erasures if sibling.attempt else self.commits).append(again)
            if output.finish_reason is not None:
                self._judge(number, sibling)

    def _judge(self, number: int, sibling: Sibling) -> None:
        world = self.world
        sibling.parked, sibling.open = sibling.open, ""
        sibling.drawn.append(tuple(sibling.ids[sibling.start :]))
        if erased(world, sibling.name, sibling.segment, sibling.attempt):
            del sibling.ids[sibling.start :]
            sibling.attempt += 1
            self._extend(number, sibling)
            return
        sibling.start, sibling.attempt, sibling.segment = len(sibling.ids), 0, sibling.segment + 1
        if sibling.segment == world.segments or sibling.ids[-1] == EOS:
            self._release(sibling)
        else:
            sibling.waiting = True
        self._pass_barrier(number)

    def _pass_barrier(self, number: int) -> None:
        left = [s for s in self.groups[number] if not s.done]
        if all(s.waiting for s in left):
            for sibling in left:
                sibling.waiting = False
                self._extend(number, sibling)

    def _release(self, sibling: Sibling) -> None:
        keys = [key for key in (sibling.open, sibling.parked) if key]
        sibling.done, sibling.waiting, sibling.open = True, False, ""
        self.scheduler.finish_requests(keys, RequestStatus.FINISHED_ABORTED)

    def _maybe_cancel(self) -> None:
        """A client goes away with its group."""
        if self.rng.random() < self.world.cancel:
            number = self.rng.randrange(len(self.groups))
            for sibling in self.groups[number]:
                if not sibling.done:
                    self._release(sibling)


def alone(world: World, name: str) -> list[tuple[int, ...]]:
    """What a sibling draws with nobody beside it and no scheduler."""
    ids, drawn = prompt_of(world, int(name.split(".")[0])), list[tuple[int, ...]]()
    for segment in range(world.segments):
        for attempt in range(4):
            arguments = arguments_of(world, name, segment, attempt)
            found: list[int] = []
            while len(found) < world.length and EOS not in found:
                found.append(next_token((*ids, *found), arguments, len(found)))
            drawn.append(tuple(found))
            if not erased(world, name, segment, attempt):
                break
        ids += found
        if EOS in found:
            break
    return drawn


def prompt_of(world: World, group: int) -> list[int]:
    """The prompt of all siblings of a group."""
    rng = random.Random(f"{world.seed} {group}")
    return [2 + rng.randrange(VOCABULARY - 2) for _ in range(world.prompt)]


def arguments_of(world: World, name: str, segment: int, attempt: int, key: str = "", parked: str = "") -> VllmArguments:
    """A request's numbers follow from what it draws."""
    rng = np.random.default_rng([world.seed, *drawn_as(world, name), segment, attempt])
    return VllmArguments(key, rng.random(world.length), Sampling(top_p=0.5 + world.end), parked)


def erased(world: World, name: str, segment: int, attempt: int) -> bool:
    """The judge's verdict; three times at most."""
    rng = random.Random(f"{world.seed} {drawn_as(world, name)} {segment} {attempt}")
    return attempt < 3 and rng.random() < world.erase


def drawn_as(world: World, name: str) -> tuple[int, int]:
    """Group and sibling that stand in a draw's name."""
    group, number = map(int, name.split("."))
    return group, number // 2 if world.twins else number


def make_scheduler(world: World, model: Path) -> Any:
    """A scheduler as vLLM's engine would have it, over a cache of so many blocks."""
    init_none_hash(sha256)
    scheduler_config = SchedulerConfig(
        max_num_seqs=world.rows,
        max_num_batched_tokens=max(world.budget, world.rows),
        max_model_len=world.longest,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=world.asynchronous,
        policy="priority",
    )
    cache_config = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache_config.num_gpu_blocks = world.blocks
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, max_model_len=world.longest),
        scheduler_config=scheduler_config,
        cache_config=cache_config,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kind = AsyncParkingScheduler if world.asynchronous else ParkingScheduler
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(world.blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )
