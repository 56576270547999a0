"""Checkpoints: all state that a run needs to continue bit-identically. Safetensors and JSON only, no pickle."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from e3rl.cluster.ranks import Ranks
from e3rl.errors import UserError
from e3rl.files import atomic_directory, damage, disk_full_is_a_sentence, write_json

FORMAT = 1
_PREFIX = "step-"
_PREFETCHED = "prefetched.arrow"


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, made when they are looked up and not kept: read from a file, or brought together from all ranks.

    Ranks that bring tensors together look up the same names in the same order.
    """

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


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` steps. ``facts`` is plain JSON: data position, statistics, schedule."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Tensor
    facts: Mapping[str, Any]
    prefetched: bytes = b""  # groups that were collected for the next step already, as an Arrow IPC stream
    describe: Callable[[Path], None] | None = None  # writes what else stands in the directory


def checkpoint_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{_PREFIX}{step:06d}"


def _share(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's part of tensors that all ranks look up together: each goes to the rank with the fewest bytes so far."""
    load, mine = [0] * ranks.world, {}
    for name, tensor in tensors.items():
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == ranks.rank:
            mine[name] = tensor.detach().cpu().contiguous().clone()
    return mine


def _file(kind: str, ranks: Ranks) -> str:
    return (
        f"{kind}.safetensors" if ranks.world == 1 else f"{kind}-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
    )


def _write_share(tensors: Mapping[str, Tensor], temporary: Path, kind: str, ranks: Ranks) -> None:
    mine = _share(tensors, ranks)

    def write() -> None:
        if not temporary.is_dir():
            raise UserError(
                f"rank {ranks.rank} can't see {temporary.parent}, where each rank writes its part of a checkpoint: "
                "put run.output_dir on a file system that all machines share"
            )
        with disk_full_is_a_sentence(temporary):
            save_file(mine, temporary / _file(kind, ranks))

    ranks.attempt(write)


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int, ranks: Ranks | None = None) -> Path:
    """Write it whole or not at all, then drop the oldest beyond ``keep`` (0 keeps all).

    All ranks write, each some of the tensors. An intact checkpoint of the same step is kept: a resumed run reaches the same
    state, and it may be the only one.
    """
    ranks = ranks or Ranks()
    directory = checkpoint_directory(run, checkpoint.step)
    if ranks.gather(ranks.first and damage(directory) is None)[0]:
        return directory
    with contextlib.ExitStack() as stack:
        begin = (lambda: stack.enter_context(atomic_directory(directory))) if ranks.first else lambda: None
        temporary = ranks.gather(ranks.attempt(begin))[0]
        assert temporary is not None
        _write_share(checkpoint.weights, temporary, "weights", ranks)
        _write_share(checkpoint.optimizer, temporary, "optimizer", ranks)
        ranks.attempt((lambda: _finish(checkpoint, temporary, stack)) if ranks.first else lambda: None)
    if ranks.first:
        for old in list_checkpoints(run)[keep:] if keep else []:
            shutil.rmtree(old, ignore_errors=True)
    return directory


def _finish(checkpoint: Checkpoint, temporary: Path, stack: contextlib.ExitStack) -> None:
    """Write the remaining files; ``stack`` then moves the directory into place."""
    save_file({"cpu": checkpoint.rng}, temporary / "rng.safetensors")
    write_json(temporary / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts})
    if checkpoint.prefetched:
        (temporary / _PREFETCHED).write_bytes(checkpoint.prefetched)
    if checkpoint.describe is not None:
        checkpoint.describe(temporary)
    stack.close()


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first."""
    return sorted((run / "checkpoints").glob(f"{_PREFIX}[0-9]*"), reverse=True)


def _stored(directory: Path, kind: str) -> Mapping[str, Tensor]:
    """The tensors in one file or several, each read when it is looked up."""
    files = [safe_open(path, "pt") for path in sorted(directory.glob(f"{kind}*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    return LazyTensors(where, lambda name: where[name].get_tensor(name))


def read_checkpoint(directory: Path) -> Checkpoint:
    """A checkpoint whose checksums have been verified."""
    problem = damage(directory)
    if problem:
        raise UserError(f"checkpoint {directory} is damaged: {problem}")
    return _read(directory)


def _read(directory: Path) -> Checkpoint:
    facts = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if facts.pop("format") != FORMAT:
        raise UserError(f"checkpoint {directory} has another format than this version reads ({FORMAT})")
    prefetched = directory / _PREFETCHED
    return Checkpoint(
        step=facts.pop("step"),
        weights=_stored(directory, "weights"),
        optimizer=_stored(directory, "optimizer"),
        rng=load_file(directory / "rng.safetensors")["cpu"],
        facts=facts,
        prefetched=prefetched.read_bytes() if prefetched.exists() else b"",
    )


def _newest_intact(run: Path, say: Any) -> Path:
    for directory in list_checkpoints(run):
        try:
            read_checkpoint(directory)
        except UserError as error:
            say(f"{error}; trying the one before")
        else:
            return directory
    raise UserError(f"{run} holds no intact checkpoint to resume from; start the run under another name")


def newest_checkpoint(run: Path, say: Any = print, ranks: Ranks | None = None) -> Checkpoint:
    """The newest intact checkpoint, as rank 0 finds it; ``note`` names every damaged one that is skipped."""
    ranks = ranks or Ranks()
    found = ranks.gather(ranks.attempt(lambda: _newest_intact(run, say) if ranks.first else None))[0]
    assert found is not None
    return _read(found)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, flat. ``names``: of its parameters, in its groups' order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    optimizer.state.clear()
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("/")
        parameter = parameters[name]
        if (
            key == "step"
        ):  # PyTorch counts in a tensor on the CPU or, fused, beside the parameter; bitsandbytes in an int
            fused = optimizer.defaults.get("fused")
            kept: Any = value.to(parameter.device) if fused else value
            kept = kept if isinstance(optimizer, torch.optim.AdamW) else int(value)
        else:
            kept = value.to(parameter.device)
        optimizer.state[parameter][key] = kept
