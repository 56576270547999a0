"""Weights as a safetensors image: written and checked in chunks that fit a core's cache, read in place."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from e3rl.errors import UserError
from e3rl.weight_files import finite

_CHUNK = 2**20  # bytes that are checked at once: they fit into a core's cache
_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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


class Checksum:
    """A hash over the sums of an image's chunks: finds damage and mixed versions at memory speed."""

    def __init__(self, image: Tensor) -> None:
        self._image, self._sums, self._done = image.numpy(), list[int](), 0

    def follow(self, written: int) -> None:
        """Add up the chunks that are complete, while they are in a core's cache."""
        while self._done + _CHUNK <= written:
            self._add(self._image[self._done : self._done + _CHUNK])

    def _add(self, chunk: np.ndarray) -> None:
        self._sums.append(int(chunk.view(np.int64).sum()))
        self._done += len(chunk)

    def named(self) -> str:
        """The checksum of the whole image."""
        self.follow(len(self._image))
        self._add(self._image[self._done : len(self._image) // 8 * 8])
        rest = self._image[self._done :].tobytes()
        return hashlib.blake2b(np.array(self._sums, np.int64).tobytes() + rest, digest_size=16).hexdigest()


def checksum(image: Tensor) -> str:
    """See `Checksum`."""
    return Checksum(image).named()


def read_image(image: Tensor, named: str | None, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image, where they lie. UserError where they are not all of ``expected``, by name, shape and dtype, or
    not finite, or where the image is not the one that the checksum ``named``."""
    head, total = header(expected), Checksum(image)
    ours = len(image) == image_size(expected) and image[: len(head)].numpy().tobytes() == head
    tensors = views(image, expected) if ours else {}
    broken, seen = None, len(head)
    for name, tensor in tensors.items():
        for part in tensor.view(-1).split(_CHUNK // tensor.itemsize):
            broken = broken if finite(part) else broken or name
            seen += part.nbytes
            total.follow(seen)
    if named is not None and total.named() != named:
        raise UserError("the weights arrived damaged: their checksum differs")
    if not ours:
        tensors = _parsed(image.numpy().tobytes(), expected)
        broken = next((name for name, tensor in tensors.items() if not finite(tensor)), None)
    if broken:
        raise UserError(f"weight {broken} holds NaN or infinity")
    return tensors


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
    """Write tensors into an image, one after the other as they lie in it; its checksum."""
    written, total = len(header(like)), Checksum(image)
    for name, place in views(image, like).items():
        tensor = values[name].detach()
        near = tensor.device.type == "cpu" and tensor.is_contiguous()
        step = _CHUNK // place.itemsize if near else max(1, place.numel())
        for to, part in zip(place.view(-1).split(step), tensor.reshape(-1).split(step), strict=True):
            to.copy_(part)
            written += to.nbytes
            total.follow(written)
    return total.named()
