"""The order of the training prompts: endless, seeded, and not changed by interruptions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.types import Prompt


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(size)`` for one epoch.

    Sorting by hash gives the same order on every machine and release; library shuffles don't guarantee that.
    """
    return sorted(range(size), key=lambda i: hashlib.blake2b(f"{seed}/{epoch}/{i}".encode(), digest_size=16).digest())


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.problem.id, prompt.ids)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _count(state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"the saved data position is damaged: {key} = {value!r}")
    return value


class PromptStream:
    """Endless epochs over the prompts, each in its own order. A position is (epoch, prompts taken from it)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise UserError("there are no prompts to train on")
        self._prompts = tuple(prompts)
        self._fingerprint = _fingerprint(self._prompts)
        self._seed = seed
        self._go_to(epoch=0, position=0)

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = epoch_order(len(self._prompts), self._seed, epoch)

    @property
    def epochs(self) -> float:
        """Passes over the prompts so far."""
        return self._epoch + self._position / len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts, all different: an epoch that has fewer left ends early and the next one begins."""
        if n > len(self._prompts):
            raise UserError(f"a step of {n} different prompts can't be made of {len(self._prompts)}")
        if self._position + n > len(self._prompts):
            self._go_to(self._epoch + 1, 0)
        chosen = self._order[self._position : self._position + n]
        self._position += n
        return [self._prompts[i] for i in chosen]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the position, the seed and a fingerprint of the data, as plain JSON values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Move to the position of a `state` that was taken over the same prompts."""
        if state.get("prompts") != len(self._prompts) or state.get("fingerprint") != self._fingerprint:
            raise UserError(
                f"the training data changed since the checkpoint ({state.get('prompts')} prompts then, "
                f"{len(self._prompts)} now, or other texts): a run can only continue on the data it started with"
            )
        epoch, position, seed = (_count(state, key) for key in ("epoch", "position", "seed"))
        if position > len(self._prompts):
            raise UserError(f"the saved data position is damaged: position {position} of {len(self._prompts)} prompts")
        self._seed = seed
        self._go_to(epoch, position)


def epochs_at(position: Mapping[str, Any]) -> float:
    """Passes over the prompts at a position that a stream's `state` gave."""
    if "sources" in position:
        return sum(position["taken"].values()) / sum(source["prompts"] for source in position["sources"].values())
    return float(position["epoch"] + position["position"] / position["prompts"])


class MixedStream:
    """Prompts of several sources by share, each source in its own endless order.

    The next source is not drawn at random: it is the one furthest behind its share. So every step has the shares to within
    one prompt of each source, and the position is the list of the sources' positions.
    """

    def __init__(self, sources: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], seed: int) -> None:
        self._streams = {name: PromptStream(prompts, seed) for name, prompts in sources.items()}
        self._shares = shares
        self._taken = dict.fromkeys(sources, 0)

    @property
    def epochs(self) -> float:
        """Prompts taken so far, divided by the number of prompts."""
        return epochs_at(self.state())

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts, all different."""
        before = sum(self._taken.values())
        counts = dict.fromkeys(self._taken, 0)
        for total in range(before + 1, before + n + 1):
            lag = {name: share * total - self._taken[name] - counts[name] for name, share in self._shares.items()}
            counts[max(lag, key=lag.__getitem__)] += 1
        found = {name: self._streams[name].take(count) for name, count in counts.items() if count}
        self._taken = {name: taken + counts[name] for name, taken in self._taken.items()}
        return [prompt for prompts in found.values() for prompt in prompts]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON values."""
        return {"taken": dict(self._taken), "sources": {name: s.state() for name, s in self._streams.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Move to the position of a `state` that was taken over the same sources."""
        sources, taken = state.get("sources"), state.get("taken")
        if not isinstance(sources, dict) or not isinstance(taken, dict) or not sources.keys() == taken.keys():
            raise UserError("the saved data position is damaged, or of a run on one source")
        if sources.keys() != self._streams.keys():
            raise UserError(
                f"the run was on other sources: {', '.join(sources)}; a run can only continue on those it started with"
            )
        counts = {name: _count(taken, name) for name in self._streams}
        for name, stream in self._streams.items():
            stream.restore(sources[name])
        self._taken = counts


Stream = PromptStream | MixedStream


def build_stream(sources: Mapping[str, Sequence[Prompt]], shares: Mapping[str, float], seed: int) -> Stream:
    """The order of the prompts of one source, or of several by their shares."""
    if len(sources) > 1:
        return MixedStream(sources, shares, seed)
    return PromptStream(next(iter(sources.values())), seed)
