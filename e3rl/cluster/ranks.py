"""The processes that train one model together, as torchrun starts them. One process is a rank of one.

Every rank runs the same trainer and comes to the same decisions: what differs between ranks (a share of the groups, of the
rows, of the optimizer's state) is exchanged here, and every wait has a limit.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from e3rl import __version__
from e3rl.config import Config, to_toml
from e3rl.errors import UserError

_T = TypeVar("_T")

_LOST = re.compile(r"connection (was )?(closed|reset|refused)|timed out|timeout|broken pipe", re.IGNORECASE)
"""PyTorch's messages where another rank is gone or silent."""


STILL_HERE = 5.0
"""Seconds between two signs of a rank that works while others wait for it."""


class OtherRankGone(UserError):
    """Raised in a rank whose exchange with another one failed or timed out."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``world``."""

    rank: int = 0
    world: int = 1
    group: Any = None  # of PyTorch's processes; None: all of them, in the main thread
    patience: timedelta | None = None  # how long an exchange may take; None: PyTorch's default

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every ``world``-th item: this rank's part of the work."""
        return list(items[self.rank :: self.world])

    def gather(self, value: _T) -> list[_T]:
        """The value of every rank, in every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.guard():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def apart(self) -> Ranks:
        """The same ranks, whose exchanges another thread may make at the same time. All ranks must call this."""
        return replace(self, group=dist.new_group(backend="gloo", timeout=self.patience)) if self.world > 1 else self

    def blocks(self, size: int) -> tuple[Ranks, Ranks]:
        """Ranks in blocks of ``size`` neighbours: those with this one's place in the other blocks, and those of its own block.

        All ranks must call this.
        """
        if size == 1:
            return self, Ranks()
        blocks = [range(first, first + size) for first in range(0, self.world, size)]
        return self._among([*zip(*blocks, strict=True)]), self._among(blocks)

    def _among(self, parts: Sequence[Sequence[int]]) -> Ranks:
        """This rank in its part of all ranks."""
        groups = [dist.new_group(list(part), timeout=self.patience) if len(part) > 1 else None for part in parts]
        [mine] = [n for n, part in enumerate(parts) if self.rank in part]
        return Ranks(parts[mine].index(self.rank), len(parts[mine]), groups[mine], self.patience)

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """The bytes of every rank, in every rank. Each goes out once, at its own length."""
        if self.world == 1:
            return [mine]
        found: list[bytes] = []
        with self.guard():
            device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
            for rank, size in enumerate(self.gather(len(mine))):
                if not size:
                    found.append(b"")
                elif rank == self.rank:
                    tensor = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
                    dist.broadcast(tensor, group_src=rank, group=self.group)
                    found.append(mine)
                else:
                    received = torch.empty(size, dtype=torch.uint8, device=device)
                    dist.broadcast(received, group_src=rank, group=self.group)
                    found.append(received.cpu().numpy().tobytes())
        return found

    def merge(self, mine: Sequence[_T]) -> list[_T]:
        """The items that every rank made of its `share`, in the order of the whole."""
        parts = self.gather(list(mine))
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over all ranks, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def while_first(self, action: Callable[[], None]) -> None:
        """The first rank does ``action`` alone, however long it takes; the others wait, and hear that it is still there.

        Another thread of the first rank tells them, so these ranks exchange nothing else (`apart`)."""
        if self.world == 1:
            action()
        elif not self.first:
            while self.gather(False)[0]:
                pass
        else:
            ended = threading.Event()

            def tell() -> None:
                while not ended.wait(STILL_HERE):
                    self.gather(True)

            with ThreadPoolExecutor(1, thread_name_prefix="still-here") as thread:
                told = thread.submit(tell)
                try:
                    action()
                finally:
                    ended.set()
                    told.exception()  # a rank that is gone meets the next exchange as well
                    self.gather(False)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any rank."""
        return any(self.gather(flag))

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Inside the ``with`` block, PyTorch's errors about a missing rank become `OtherRankGone`."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
                raise
            reason = str(error).strip().splitlines()[0]
            raise OtherRankGone(
                f"rank {self.rank} waited for another rank that is gone or silent ({reason}): what that one wrote says why. "
                "Start all again with --resume: the run goes on from its newest checkpoint"
            ) from error

    def attempt(self, action: Callable[[], _T]) -> _T:
        """The result of ``action``, which every rank runs; a UserError in one is raised in all."""
        try:
            done, problem = action(), None
        except UserError as error:
            done, problem = None, str(error)
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise UserError(problems[0])
        return cast(_T, done)


def join_ranks(config: Config) -> Ranks:
    """Join the processes that torchrun started, if it did. UserError where they are not what the recipe asks for."""
    world, parallel = _number("WORLD_SIZE", 1), config.train.parallel
    if config.train.workers not in (0, world):
        raise UserError(
            f"train.workers = {config.train.workers} asks for as many ranks, and there are {world}: e3rl train starts them "
            "on Ray; under torchrun leave train.workers at 0"
        )
    if world == 1 and config.train.context_parallel == 1:
        return Ranks()
    if parallel == "none":
        raise UserError(
            f"{world} processes were started, and train.parallel = 'none' would train the same model in each of them: set "
            "train.parallel to ddp, zero1, zero2, fsdp2, deepspeed-zero2 or deepspeed-zero3, or start one process"
        )
    if world % config.train.context_parallel:
        raise UserError(
            f"train.context_parallel = {config.train.context_parallel} divides every row among as many ranks, and "
            f"{world} ranks are no multiple of that"
        )
    if config.train.prompts_per_step < world:
        raise UserError(
            f"{world} processes were started, and a step has only train.prompts_per_step = {config.train.prompts_per_step} "
            "groups: raise it or start fewer processes"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE = {world} is set and {', '.join(missing)} is not: start the processes with torchrun"
        )
    patience = timedelta(seconds=config.train.rank_timeout)
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() and config.model.device != "cpu" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(_number("LOCAL_RANK", 0))
        try:
            dist.init_process_group(backend, timeout=patience)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"rank {os.environ['RANK']} can't meet the others at {where}: {error}") from None
        atexit.register(_leave)
    ranks = Ranks(dist.get_rank(), world, patience=patience)
    _agree(ranks, config)
    return ranks


def _leave() -> None:
    """End the group's threads while Python still runs: one that lets go of a tensor while it ends aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _agree(ranks: Ranks, config: Config) -> None:
    """Refuse ranks that were started differently: they would train different models together."""
    mine = {
        "settings": hashlib.blake2b(to_toml(config).encode(), digest_size=8).hexdigest(),
        "a version of e3rl": __version__,
        "a version of PyTorch": torch.__version__,
        "a version of Python": platform.python_version(),
    }
    said = ranks.gather(mine)
    for what in mine:
        others = [rank for rank, facts in enumerate(said) if facts[what] != said[0][what]]
        if others:
            raise UserError(
                f"ranks {others} were started with {what} other than rank 0's ({said[others[0]][what]}, {said[0][what]}): "
                "start all with the same command, in the same environment"
            )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} = '{text}' is no number")
    return int(text)
