"""Tensors by name that are made when they are looked up: brought together from all ranks, or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Nothing looked up is kept here. Where ranks bring tensors together, all look up the same names in the same order."""

    def __init__(self, names: Iterable[str], bring: Callable[[str], Tensor]) -> None:
        self._names, self._bring = dict.fromkeys(names), bring

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._bring(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
