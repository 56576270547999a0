"""New weights for rollout workers: written once, as a safetensors image in shared memory, for any number of receivers.

A receiver on the same machine reads the image in place: the publisher tells it a process id and a descriptor (`Offer`), so
there is no file to clean up: the memory is freed with the last process that has it open. A receiver elsewhere is sent the
same bytes. The publisher copies every byte once and reads it once, for a checksum, however many receivers there are.

Readers hold a shared lock, a writer an exclusive one, and the kernel takes them from a process that dies. So nobody reads half an
update: the lock keeps a writer out, and the state before the image says whether the last one came to its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from e3rl.errors import UserError
from e3rl.weights.image import header, image_size, write_image

_STATE = struct.Struct("<8sqq32s")  # mark, version, bytes of the image, checksum
_MARK, _UNFINISHED = b"e3rl-w1\n", -1
_START = 4096  # of the image: a page behind the state
_POLL = 0.01

PATIENCE = 30.0
"""Seconds that a publisher waits for readers of the version before; then it writes to new memory and leaves them the old."""


class NotReachable(Exception):
    """The image can't be opened from here: the receiver has to be sent the bytes."""


@dataclass(frozen=True)
class Offer:
    """A published version, for a receiver on the same machine: descriptor ``fd`` of process ``pid`` is its memory."""

    version: int
    pid: int
    fd: int
    size: int
    checksum: str


def this_node() -> str:
    """Identifies who can open this process's descriptors: boot, process namespace and user; '' where nobody can."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
    except OSError:
        return ""


class SharedImage:
    """Shared memory with a state and an image. Every process that opens it has a lock of its own."""

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        self.fd, self.size = fd, size
        self._map = mmap.mmap(fd, _START + size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        with warnings.catch_warnings():  # PyTorch has no read-only tensors; nothing writes to this one
            warnings.simplefilter("ignore", UserWarning)
            self.image = torch.frombuffer(self._map, dtype=torch.uint8)[_START:]

    @classmethod
    def create(cls, size: int) -> SharedImage:
        """New memory for an image of ``size`` bytes."""
        if sys.platform == "linux":
            fd = os.memfd_create("e3rl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _START + size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
            os.ftruncate(fd, _START + size)
        return cls(fd, size, writable=True)

    @classmethod
    def open(cls, path: str, size: int) -> SharedImage:
        """The memory of another process, or of this one, to be read. NotReachable where it might shrink meanwhile: whoever reads
        beyond its end is killed."""
        own = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe, opening would wait for its writer
        try:
            sealed = sys.platform != "linux" or fcntl.fcntl(own, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if size <= 0 or os.fstat(own).st_size != _START + size or not sealed:
                raise NotReachable(f"{path} is other memory than was offered")
            return cls(own, size, writable=False)
        except BaseException:
            os.close(own)
            raise

    def lock(self, *, exclusive: bool, seconds: float) -> bool:
        """Take the lock; False where it is not free within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
                time.sleep(_POLL)

    def unlock(self) -> None:
        """Release the lock."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def set_state(self, version: int, named: str = "") -> None:
        """Say what the image is; `_UNFINISHED` while it is written."""
        self._map[: _STATE.size] = _STATE.pack(_MARK, version, self.size, named.encode())

    def state(self) -> tuple[int, str]:
        """Version and checksum."""
        mark, version, _, named = _STATE.unpack_from(self._map)
        if mark != _MARK:
            raise NotReachable("there are no weights in the memory that was offered")
        return version, named.rstrip(b"\0").decode("ascii", "replace")

    def close(self) -> None:
        """Close the descriptor; memory stays mapped while tensors use it."""
        os.close(self.fd)


@dataclass(frozen=True)
class Published:
    """A version that receivers can have: read where it lies, or sent."""

    offer: Offer

    @property
    def version(self) -> int:
        return self.offer.version

    @contextlib.contextmanager
    def image(self) -> Iterator[memoryview]:
        """The image's bytes, to be sent; they don't change meanwhile."""
        receiver = Receiver()
        try:
            with receiver.taken(self.offer, PATIENCE) as image:
                yield image.numpy().data
        finally:
            receiver.close()


class Publisher:
    """Writes versions, each over the one before. ``moved`` counts the bytes that were copied and those that were hashed."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._memory: SharedImage | None = None
        self.moved = {"copied": 0, "hashed": 0}

    def publish(self, version: int, like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Published:
        """Write a version. ``like`` says names, shapes and types; ``values`` are looked up one after the other."""
        head, size = header(like), image_size(like)
        memory = self._claim(size)
        try:
            memory.set_state(_UNFINISHED)
            memory.image[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
            named = write_image(memory.image, like, values)
            memory.set_state(version, named)
        finally:
            memory.unlock()
        self.moved["copied"] += size
        self.moved["hashed"] += size
        return Published(Offer(version, os.getpid(), memory.fd, size, named))

    def _claim(self, size: int) -> SharedImage:
        """Memory that nobody reads, locked: new where there is none or a reader does not let go of it."""
        memory = self._memory
        if memory is not None and memory.size == size and memory.lock(exclusive=True, seconds=self._patience):
            return memory
        self.close()
        self._memory = SharedImage.create(size)
        self._memory.lock(exclusive=True, seconds=0)
        return self._memory

    def close(self) -> None:
        """Release the memory; it is freed with the last reader."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


class Receiver:
    """Reads images that are offered. It keeps the memory of the one before open: most often the next is written to it."""

    def __init__(self) -> None:
        self._open: tuple[tuple[int, int, int], SharedImage] | None = None

    @contextlib.contextmanager
    def taken(self, offer: Offer, seconds: float) -> Iterator[Tensor]:
        """The image that was offered, which nobody changes inside the ``with`` block; waits so many seconds at most.

        NotReachable where it can't be opened from here; UserError where it is not, or not yet, what was offered.
        """
        memory = self._memory(offer)
        if not memory.lock(exclusive=False, seconds=seconds):
            raise UserError(
                f"weights of version {offer.version} were offered, and an update was not finished within {seconds:g} s: the "
                "trainer hangs, or has been stopped in the middle of it"
            )
        try:
            version, named = memory.state()
            if version == _UNFINISHED:
                raise UserError(
                    f"weights of version {offer.version} were offered, and an update was begun and never finished: what "
                    "published it has failed or died in the middle of it"
                )
            if (version, named) != (offer.version, offer.checksum):
                raise UserError(
                    f"versions cross: weights of version {offer.version} were offered, and those there are of version {version}"
                )
            yield memory.image
        finally:
            memory.unlock()

    def _memory(self, offer: Offer) -> SharedImage:
        """The memory that was offered, opened anew where it is other memory than that of the last offer."""
        process = f"/proc/{offer.pid}"
        if sys.platform != "linux" and offer.pid == os.getpid():
            process = "/dev"
        path = f"{process}/fd/{offer.fd}"
        try:
            wanted = (os.stat(path).st_dev, os.stat(path).st_ino, offer.size)
            if self._open is None or self._open[0] != wanted:
                self.close()
                self._open = wanted, SharedImage.open(path, offer.size)
        except OSError as error:
            raise NotReachable(f"{path} can't be opened from here ({error.strerror})") from None
        return self._open[1]

    def close(self) -> None:
        """Release the memory."""
        found, self._open = self._open, None
        if found is not None:
            found[1].close()
