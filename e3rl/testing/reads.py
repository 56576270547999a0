"""Counts reads of device values and copies to the device, with PyTorch's `meta` device as a stand-in.

It holds no values, so every read is intercepted, counted and answered with zeros. Operations that mix devices fail as they
do on a GPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_ANSWERS = {"aten._local_scalar_dense": 0, "aten.item": 0, "aten.is_nonzero": False, "aten.equal": True}
_SIZED = ("aten.nonzero", "aten.masked_select")  # the size of what comes out depends on values


def _place() -> str:
    """The innermost function of e3rl on the stack."""
    frames = [f for f in traceback.extract_stack() if "/e3rl/" in f.filename and "/testing/" not in f.filename]
    return f"{frames[-1].filename.rpartition('/e3rl/')[2]}:{frames[-1].name}" if frames else "elsewhere"


class DeviceReads(TorchDispatchMode):
    """Counts ``reads`` from the device and ``copies`` to it inside the ``with`` block, by calling function."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._made = _Made(self.copies)

    def __enter__(self) -> DeviceReads:
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().replace("::", ".").partition(".")[0] + "." + func.name().partition("::")[2].partition(".")[0]
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = first is not None and first.device == META
        if name in ("aten._to_copy", "aten.to") and first is not None:
            target = next((x for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)), None)
            if on_device and target is not None and target != META:
                self.reads[_place()] += 1
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if not on_device and target == META:
                self.copies[_place()] += 1
        if on_device and name in _ANSWERS:
            self.reads[_place()] += 1
            return _ANSWERS[name]
        if on_device and name in _SIZED:
            raise AssertionError(f"{name} in {_place()}: the size of what comes out depends on values of the device")
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Counts tensors that are made on the device from Python's numbers."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == META
        indexed = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META and _by_list(args[1])
        if made or indexed:
            self._copies[_place()] += 1
        return func(*args, **kwargs)


def _by_list(index: Any) -> bool:
    return any(isinstance(i, list) for i in (index if isinstance(index, tuple) else (index,)))
