"""Checkpoints: everything a run needs to go on as if it had never stopped. Safetensors and JSON only, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from e3rl.errors import UserError
from e3rl.files import atomic_directory, damage, write_json

FORMAT = 1
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` steps. ``facts`` is plain JSON: data position, statistics, schedule."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Tensor
    facts: Mapping[str, Any]


def checkpoint_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{_PREFIX}{step:06d}"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write it whole or not at all, then drop the oldest beyond ``keep`` (0 keeps all).

    An intact one of the same step stays: a resumed run comes to the same state, and it may be the only one there is.
    """
    directory = checkpoint_directory(run, checkpoint.step)
    if damage(directory) is None:
        return directory
    with atomic_directory(directory) as temporary:
        save_file(_plain(checkpoint.weights), temporary / "weights.safetensors")
        save_file(_plain(checkpoint.optimizer), temporary / "optimizer.safetensors")
        save_file({"cpu": checkpoint.rng}, temporary / "rng.safetensors")
        write_json(temporary / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts})
    for old in list_checkpoints(run)[keep:] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return directory


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint directories of a run, newest first."""
    return sorted((run / "checkpoints").glob(f"{_PREFIX}[0-9]*"), reverse=True)


def read_checkpoint(directory: Path) -> Checkpoint:
    """A checkpoint whose checksums have been verified."""
    problem = damage(directory)
    if problem:
        raise UserError(f"checkpoint {directory} is damaged: {problem}")
    facts = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if facts.pop("format") != FORMAT:
        raise UserError(f"checkpoint {directory} has another format than this version reads ({FORMAT})")
    return Checkpoint(
        step=facts.pop("step"),
        weights=load_file(directory / "weights.safetensors"),
        optimizer=load_file(directory / "optimizer.safetensors"),
        rng=load_file(directory / "rng.safetensors")["cpu"],
        facts=facts,
    )


def newest_checkpoint(run: Path, say: Any = print) -> Checkpoint:
    """The newest intact checkpoint; every damaged one that is passed over is named aloud."""
    for directory in list_checkpoints(run):
        try:
            return read_checkpoint(directory)
        except UserError as error:
            say(f"{error}; trying the one before")
    raise UserError(f"{run} holds no intact checkpoint to resume from; start the run under another name")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, flat."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    position = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("/")
        state.setdefault(position[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
