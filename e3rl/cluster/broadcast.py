"""New weights for workers on other machines by torch.distributed: each byte of the image leaves the trainer once for all.

Trainer and workers meet in a process group of their own, gloo or, where all have GPUs, NCCL. What goes wrong in it ends the
group in bounded time, for everybody: weights that did not arrive whole are used by nobody, and the trainer sends them to each
worker instead (HTTP, a call of Ray).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from e3rl.cluster.wire import encode
from e3rl.errors import UserError
from e3rl.weights.publish import Published

CHUNK = 2**26
"""Bytes of the image that travel at once."""

SECONDS_TO_MEET = 60.0
SECONDS_A_CHUNK = 60.0
"""How long anybody waits for the others to come, and for the next chunk."""

_HEAD = 64  # bytes: version, size, checksum


@dataclass(frozen=True)
class Meeting:
    """Where a process group meets, and as whom this worker comes. ``key`` names it among all meetings there."""

    host: str
    port: int
    key: str
    rank: int
    world: int
    backend: str


@dataclass(frozen=True)
class Broadcast:
    """A version that is about to be broadcast in the group that meets there."""

    meeting: Meeting
    version: int
    size: int
    checksum: str


class BroadcastFailed(Exception):
    """The group is of no use any more: somebody is gone or silent, or waits for another version."""


@contextlib.contextmanager
def _in_time(what: str) -> Iterator[None]:
    """PyTorch's errors in words."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # a store or a backend may say anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BroadcastFailed(f"{what} ({reason[:200]})") from None


def local_address(host: str, port: int) -> str:
    """This machine's address on its way to another."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((host, port))  # sends nothing
        found: str = asked.getsockname()[0]
        return found


class WeightGroup:
    """One process's part in a group that weights are broadcast in; the trainer is rank 0."""

    def __init__(self, meeting: Meeting, store: Any = None) -> None:
        self.key, self._first, self._cuda = meeting.key, meeting.rank == 0, meeting.backend == "nccl"
        meet, each = timedelta(seconds=SECONDS_TO_MEET), timedelta(seconds=SECONDS_A_CHUNK)
        with _in_time(f"not all came within {SECONDS_TO_MEET:g} s"):
            store = store or dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=meet)
            own = meeting.host if self._first else local_address(meeting.host, meeting.port)
            named = dist.PrefixStore(meeting.key, store)
            self._group: Any
            if self._cuda:
                nccl = dist.ProcessGroupNCCL.Options()
                nccl._timeout = each
                self._group = dist.ProcessGroupNCCL(named, meeting.rank, meeting.world, nccl)
            else:
                kind: Any = dist.ProcessGroupGloo
                gloo = kind._Options()
                gloo._devices, gloo._timeout = [kind.create_device(hostname=own)], meet
                self._group = kind(named, meeting.rank, meeting.world, gloo)

    def _broadcast(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, timedelta(seconds=SECONDS_A_CHUNK)
        travelling = tensor.cuda() if self._cuda else tensor
        self._group.broadcast([travelling], options).wait(timedelta(seconds=SECONDS_A_CHUNK))
        if self._cuda and not self._first:
            tensor.copy_(travelling)

    def send(self, version: int, checksum: str, image: Tensor) -> None:
        """Give all others a version. BroadcastFailed where one of them is gone, or silent for too long."""
        with _in_time(f"a worker has gone, or took nothing for {SECONDS_A_CHUNK:g} s"):
            self._broadcast(_head(version, len(image), checksum))
            for chunk in image.split(CHUNK):
                self._broadcast(chunk)

    def receive(self, wanted: Broadcast) -> Tensor:
        """The image of that version. BroadcastFailed where it does not come whole, or another one comes."""
        image, head = torch.empty(wanted.size, dtype=torch.uint8), torch.zeros(_HEAD, dtype=torch.uint8)
        what = f"weights of version {wanted.version} were announced, and their trainer has gone or sent nothing"
        with _in_time(f"{what} for {SECONDS_A_CHUNK:g} s"):
            self._broadcast(head)
            if not torch.equal(head, _head(wanted.version, wanted.size, wanted.checksum)):
                version = int(head[:8].view(torch.int64))
                raise BroadcastFailed(
                    f"versions cross: weights of version {wanted.version} were announced, and version {version} came"
                )
            for chunk in image.split(CHUNK):
                self._broadcast(chunk)
        return image

    def close(self) -> None:
        """Leave: whoever still waits for this process is told at once."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def _head(version: int, size: int, checksum: str) -> Tensor:
    numbers = torch.tensor([version, size]).view(torch.uint8)
    named = torch.frombuffer(bytearray(checksum.encode().ljust(_HEAD - len(numbers), b"\0")), dtype=torch.uint8)
    return torch.cat([numbers, named])


class Audience:
    """A worker's end: it joins the group that it is told of, and stays in it as long as nothing goes wrong."""

    def __init__(self) -> None:
        self._group: WeightGroup | None = None

    def receive(self, wanted: Broadcast) -> Tensor:
        """The image. UserError, and an end of the group, where it can't be had."""
        try:
            if self._group is None or self._group.key != wanted.meeting.key:
                self.leave()
                self._group = WeightGroup(wanted.meeting)
            return self._group.receive(wanted)
        except BroadcastFailed as failed:
            self.leave()
            raise UserError(f"the weights did not come by broadcast: {failed}") from None

    def leave(self) -> None:
        """Have no group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


class Hearer(Protocol):
    """A connection to a worker elsewhere, as `Broadcaster` uses it."""

    def address(self) -> str:
        """This machine's address on the way to the worker."""

    def receive_weights(self, body: bytes) -> None:
        """See `RolloutWorker.receive_weights`."""


class BroadcastSeat(Protocol):
    """A worker's place in the pool."""

    lock: Any  # nobody else speaks with the worker meanwhile
    version: int | None  # that it has

    def hearer(self) -> Hearer | None:
        """The worker where it is on another machine."""


class Broadcaster:
    """The trainer's end: gathers the workers in a group and keeps it as long as they are the same and all goes well."""

    def __init__(self, note: Callable[[str], None] = lambda _: None, *, cuda: bool = False) -> None:
        self._note, self._backend = note, "nccl" if cuda else "gloo"
        self._store: Any = None
        self._group: WeightGroup | None = None
        self._members: tuple[Hearer, ...] = ()
        self._meeting: Meeting | None = None
        self._useless = False  # the workers can't be met: they are sent the weights, from now on

    def publish(self, weights: Published, seats: Sequence[BroadcastSeat]) -> None:
        """Give a version to the workers elsewhere that are known already; those who don't have it then are sent it."""
        free = [seat for seat in seats if not self._useless and seat.lock.acquire(blocking=False)]
        heard = [(seat, hearer) for seat in free if (hearer := seat.hearer()) is not None]
        try:
            if heard:
                with weights.image() as image:
                    tensor = torch.frombuffer(image, dtype=torch.uint8)
                    has = self.send(weights.version, weights.offer.checksum, tensor, [hearer for _, hearer in heard])
                for (seat, _), took in zip(heard, has, strict=True):
                    seat.version = weights.version if took else None
        except BroadcastFailed as failed:
            self._note(
                f"weights of version {weights.version} could not be broadcast: {failed}; each worker is sent them"
                + (", and those that follow" if self._useless else "")
            )
        finally:
            for seat in free:
                seat.lock.release()

    def send(self, version: int, checksum: str, image: Tensor, to: Sequence[Hearer]) -> list[bool]:
        """Whether each of them has the version now. BroadcastFailed where the group broke before all had it."""
        if self._group is None or self._members != tuple(to):
            self.close_group()
            self._meeting = self._arranged(to)
        meeting = self._meeting
        assert meeting is not None
        calls = [
            _Call(hearer, encode(Broadcast(replace(meeting, rank=rank), version, len(image), checksum)))
            for rank, hearer in enumerate(to, 1)
        ]
        try:
            if self._group is None:
                self._useless = True
                self._group, self._members = WeightGroup(meeting, self._store), tuple(to)
                self._useless = False
            self._group.send(version, checksum, image)
        except BroadcastFailed:
            self.close_group()
            raise
        finally:
            has = [call.wait() for call in calls]
        if not all(has):  # whoever did not take it has left the group
            self.close_group()
        return has

    def _arranged(self, to: Sequence[Hearer]) -> Meeting:
        """A new meeting, at an address that all of them reach this machine by."""
        addresses = [hearer.address() for hearer in to]
        host = next((a for a in addresses if not a.startswith("127.") and a != "::1"), addresses[0])
        if self._store is None:
            with _in_time("no port can be opened for it"):
                self._store = dist.TCPStore(
                    host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS_TO_MEET)
                )
        return Meeting(host, self._store.port, uuid.uuid4().hex, 0, len(to) + 1, self._backend)

    def close_group(self) -> None:
        """Leave the present group."""
        group, self._group, self._members = self._group, None, ()
        if group is not None:
            group.close()


class _Call:
    """A call of a worker in a thread: it ends when the broadcast has."""

    def __init__(self, hearer: Hearer, body: bytes) -> None:
        self._hearer, self._body, self._has = hearer, body, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._hearer.receive_weights(self._body)
            self._has = True
        except Exception:  # whatever it is: this worker is sent the weights, and then it is said
            self._has = False

    def wait(self) -> bool:
        """Whether it took them."""
        self._thread.join()
        return self._has
