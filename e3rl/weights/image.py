"""Weights as a safetensors image: written and checked in chunks that fit a core's cache, read in place."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from e3rl.errors import UserError
from e3rl.weights.files import finite

_CHUNK = 2**19  # bytes that are checked at once: they fit into a core's cache, twice
_MOST_THREADS = 8  # more of them wait for memory, or for Python
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_INFINITY = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0xFF << 23,
    torch.bfloat16: 0xFF << 7,
    torch.float16: 0x1F << 10,
}


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The head of a safetensors image of these tensors, which follow one after the other; only their shapes are looked at."""
    entries, end = {}, 0
    for name in in_order(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        if tensor.dtype not in _KINDS:
            raise UserError(f"weight {name} is {tensor.dtype}, which rollout workers can't be sent")
        entries[name] = {"dtype": _KINDS[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text


def sendable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether an image can hold all of them."""
    return all(tensor.dtype in _KINDS for tensor in tensors.values())


def image_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the image."""
    return len(header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of these tensors as they follow one another in an image."""
    return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)


def views(image: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of the tensors in an image whose head is that of ``like``."""
    found, position = {}, len(header(like))
    for name in in_order(like):
        tensor = like[name]
        found[name] = image[position : position + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        position += tensor.nbytes
    return found


def tensors_of(image: Tensor) -> dict[str, Tensor]:
    """The tensors of a whole image by its own head, where they lie."""
    [length] = struct.unpack("<Q", image[:8].numpy().tobytes())
    kinds = {name: kind for kind, name in _KINDS.items()}
    found = {}
    for name, entry in json.loads(image[8 : 8 + length].numpy().tobytes()).items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = image[begin:end].view(kinds[entry["dtype"]]).view(entry["shape"])
    return found


class Sums:
    """The sums of an image's chunks, from which its checksum is made: damage and mixed versions are found at memory speed."""

    def __init__(self, image: Tensor) -> None:
        self.bytes = image.numpy()
        self._whole = len(self.bytes) // 8 * 8
        self._sums = np.zeros(-(-self._whole // _CHUNK), np.int64)

    def add(self, number: int) -> None:
        """Add up a chunk, best while it is in a core's cache."""
        if number < len(self._sums):
            chunk = self.bytes[number * _CHUNK : min(self._whole, (number + 1) * _CHUNK)]
            self._sums[number] = chunk.view(np.int64).sum()

    def named(self) -> str:
        """The checksum, once all chunks are added up."""
        rest = self.bytes[self._whole :].tobytes()
        return hashlib.blake2b(self._sums.tobytes() + rest, digest_size=16).hexdigest()


class _Threads(contextlib.AbstractContextManager["_Threads"]):
    """Threads that share chunks out among them: numpy lets them run beside each other."""

    def __init__(self) -> None:
        self._threads = min(torch.get_num_threads(), _MOST_THREADS)
        self._pool = ThreadPoolExecutor(self._threads)

    def each(self, work: Callable[[int], None], numbers: range) -> None:
        """Call ``work`` for each number, in any order."""
        shared = iter(numbers)

        def some() -> None:
            for number in shared:
                work(number)

        helpers = [self._pool.submit(some) for _ in range(min(self._threads, len(numbers)) - 1)]
        some()
        for helper in helpers:
            helper.result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _chunks(begin: int, end: int) -> range:
    """The chunks with these bytes in them."""
    return range(begin // _CHUNK, -(-end // _CHUNK))


def checksum(image: Tensor) -> str:
    """See `Sums`."""
    total = Sums(image)
    with _Threads() as threads:
        threads.each(total.add, _chunks(0, len(image)))
    return total.named()


def read_image(image: Tensor, named: str | None, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image, where they lie. UserError where they are not all of ``expected``, by name, shape and dtype, or
    not finite, or where the image is not the one that the checksum ``named``. One pass over the bytes."""
    head, total, broken = header(expected), Sums(image), list[int]()
    ours = len(image) == image_size(expected) and image[: len(head)].numpy().tobytes() == head
    stretches = _stretches(expected) if ours else []

    def check(number: int) -> None:
        total.add(number)
        for kind, begin, end in stretches:
            part = total.bytes[max(begin, number * _CHUNK) : min(end, (number + 1) * _CHUNK)]
            if len(part) and not _finite(part, kind):
                broken.append(number)

    with _Threads() as threads:
        threads.each(check, _chunks(0, len(image)))
    if named is not None and total.named() != named:
        raise UserError("the weights arrived damaged: their checksum differs")
    tensors = views(image, expected) if ours else _parsed(image.numpy().tobytes(), expected)
    if broken or not ours:
        wrong = next((name for name, tensor in tensors.items() if not finite(tensor)), None)
        if wrong is not None:
            raise UserError(f"weight {wrong} holds NaN or infinity")
    return tensors


def _stretches(tensors: Mapping[str, Tensor]) -> list[tuple[torch.dtype, int, int]]:
    """Where in an image numbers of one type lie side by side: type, first byte and the one after the last."""
    found, end = list[tuple[torch.dtype, int, int]](), len(header(tensors))
    for kind, names in itertools.groupby(in_order(tensors), lambda name: tensors[name].dtype):
        begin, end = end, end + sum(tensors[name].nbytes for name in names)
        found.append((kind, begin, end))
    return found


def _finite(part: np.ndarray, kind: torch.dtype) -> bool:
    """Whether all numbers are. As integers, the bits of infinity and NaN are beyond those of all numbers of their sign."""
    size, infinity = kind.itemsize, _INFINITY[kind]
    most, most_below_zero = int(part.view(f"i{size}").max()), int(part.view(f"u{size}").max())
    return most < infinity and most_below_zero < infinity + 2 ** (8 * size - 1)


def _parsed(body: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors in another order than ours."""
    try:
        tensors: dict[str, Tensor] = load_safetensors(body)
    except Exception as error:  # safetensors' own error is no ValueError
        raise UserError(f"the weights are no safetensors: {error}") from None
    for what, names in (("lack", expected.keys() - tensors), ("hold strangers:", tensors.keys() - expected)):
        if names:
            raise UserError(
                f"the weights {what} {', '.join(sorted(names)[:3])} ({len(names)} of {len(expected)} tensors)"
            )
    for name, own in expected.items():
        tensor = tensors[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise UserError(
                f"weight {name} is {tensor.dtype} {tuple(tensor.shape)}, and this worker's {own.dtype} {tuple(own.shape)}: "
                "start it with the run's own recipe, model.dtype included"
            )
    return tensors


@torch.no_grad()
def write_image(image: Tensor, like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> str:
    """Write tensors into an image, one after the other as they lie in it; its checksum. Each is looked up in this thread."""
    total, end = Sums(image), len(header(like))
    with _Threads() as threads:
        threads.each(total.add, range(end // _CHUNK))  # of the head, which may be longer than a chunk
        for name, place in views(image, like).items():
            begin, end = end, end + place.nbytes
            threads.each(_writing(total, begin, place, values[name].detach()), _chunks(begin, end))
        threads.each(total.add, _chunks(end, len(image)))
    return total.named()


def _writing(total: Sums, begin: int, place: Tensor, tensor: Tensor) -> Callable[[int], None]:
    """What brings a tensor to its place, which begins there, chunk by chunk, and adds up those that are complete then."""
    end = begin + place.nbytes
    if tensor.device.type != "cpu" or tensor.dtype != place.dtype:
        place.copy_(tensor)
        return lambda number: total.add(number) if (number + 1) * _CHUNK <= end else None
    source = tensor.reshape(-1).view(torch.uint8).numpy()

    def write(number: int) -> None:
        first, last = max(begin, number * _CHUNK), min(end, (number + 1) * _CHUNK)
        total.bytes[first:last] = source[first - begin : last - begin]
        if last == (number + 1) * _CHUNK:
            total.add(number)

    return write
