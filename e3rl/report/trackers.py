"""Listeners that show a run elsewhere: experiment trackers by their names in train.report_to, and the run's own page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e3rl.config import Config, to_tables
from e3rl.errors import UserError, unknown
from e3rl.evaluate.figures import evaluated_name
from e3rl.report import write_report
from e3rl.train.listeners import Listener, Silent


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers as they are, series by segment index as name/0, name/1, …"""
    flat = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    for key, series in record.items():
        if isinstance(series, list):
            flat |= {f"{key}/{i}": float(v) for i, v in enumerate(series) if v is not None}
    return flat


class TensorBoard(Silent):
    """Event files in the run directory's tensorboard/."""

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def stepped(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(f"train/{name}", value, record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(f"eval_{evaluated_name(record)}/{name}", value, record["step"])

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()


class ModuleTracker(Silent):
    """Weights & Biases, and trackio, which has the same interface."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._module.init(project="e3rl", name=config.run.name, config={"method": method, **to_tables(config)})

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._module.log({f"train/{k}": v for k, v in _scalars(record).items()}, step=record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        scalars = {f"eval_{evaluated_name(record)}/{k}": v for k, v in _scalars(record).items()}
        self._module.log(scalars, step=record["step"])

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._module.finish()


def build_trackers(names: tuple[str, ...]) -> list[Listener]:
    """The trackers of train.report_to; a missing package is said before the run starts."""
    import importlib

    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    trackers: list[Listener] = []
    for name in names:
        if name not in packages:
            raise unknown("tracker in train.report_to", name, packages)
        try:
            module = importlib.import_module(packages[name])
        except ImportError:
            raise UserError(
                f"train.report_to names {name}, which is not installed: pip install 'e3rl[{name}]'"
            ) from None
        trackers.append(TensorBoard() if name == "tensorboard" else ModuleTracker(module))
    return trackers


_SHARE_OF_TIME = 0.02
"""Writing the page may take at most this share of a run's time."""


class ReportListener(Silent):
    """Rewrites report.html after steps, as often as that stays cheap, and at the end."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._run = run
        self._write()

    def stepped(self, record: Mapping[str, Any]) -> None:
        if time.perf_counter() >= self._next:
            self._write()

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._write()

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            write_report(self._run)
        except UserError as error:  # a page that can't be written must not cost the run
            self._note(f"the report was not written: {error}")
        now = time.perf_counter()
        self._next = now + (now - began) / _SHARE_OF_TIME
