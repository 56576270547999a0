"""Listeners of a run: the experiment trackers named in train.report_to, and the run's own page."""

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
    """Numbers unchanged; series by segment index as name/0, name/1, …"""
    flat = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    for key, series in record.items():
        if isinstance(series, list):
            flat |= {f"{key}/{i}": float(v) for i, v in enumerate(series) if v is not None}
    return flat


USUAL_NAMES: Mapping[str, str] = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "degenerate_groups",
    "completions/mean_length": "length",
    "completions/min_length": "length_min",
    "completions/max_length": "length_max",
    "completions/mean_terminated_length": "length_finished",
    "clip_ratio/region_mean": "clip_fraction",
    "clip_ratio/low_mean": "clip_low",
    "clip_ratio/high_mean": "clip_high",
    "tools/call_frequency": "calls",
    "tools/failure_frequency": "call_errors",
    "kl": "kl",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "num_tokens": "tokens_total",
    "epoch": "epoch",
}
"""TRL's names of metrics, which dashboards expect, and ours."""


def _logged(record: Mapping[str, Any]) -> dict[str, float]:
    """A step's numbers as train/NAME, and a copy under TRL's name if it has one."""
    scalars = _scalars(record)
    usual = {name: scalars[ours] for name, ours in USUAL_NAMES.items() if ours in scalars}
    if "finish_ratio" in scalars:
        usual["completions/clipped_ratio"] = 1 - scalars["finish_ratio"]
    return {f"train/{k}": v for k, v in {**scalars, **usual}.items()}


class TensorBoard(Silent):
    """Event files in the run directory's tensorboard/."""

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def stepped(self, record: Mapping[str, Any]) -> None:
        for name, value in _logged(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(f"eval_{evaluated_name(record)}/{name}", value, record["step"])

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()


class ModuleTracker(Silent):
    """Weights & Biases, and trackio and SwanLab, which have the same interface."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._module.init(project="e3rl", name=config.run.name, config={"method": method, **to_tables(config)})

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._module.log(_logged(record), step=record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        scalars = {f"eval_{evaluated_name(record)}/{k}": v for k, v in _scalars(record).items()}
        self._module.log(scalars, step=record["step"])

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._module.finish()


def _as_files(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics renamed so that no name is another's folder: MLflow may keep each in a file."""
    named = {}
    for name, value in metrics.items():
        owner = next((n for n in metrics if name.startswith(f"{n}/")), None)
        named[f"{owner}.{name[len(owner) + 1 :].replace('/', '.')}" if owner else name] = value
    return named


class MLflow(Silent):
    """A run of the experiment e3rl at MLflow's tracking URI."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._module.set_experiment("e3rl")
        self._module.start_run(run_name=config.run.name)
        flat = {
            f"{section}.{k}": str(v)[:500] for section, table in to_tables(config).items() for k, v in table.items()
        }
        self._module.log_params({"method": method, **flat})

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._module.log_metrics(_as_files(_logged(record)), step=record["step"])

    def evaluated(self, record: Mapping[str, Any]) -> None:
        scalars = {f"eval_{evaluated_name(record)}/{k}": v for k, v in _scalars(record).items()}
        self._module.log_metrics({k.replace("@", "_at_"): v for k, v in scalars.items()}, step=record["step"])

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._module.end_run()


class Tracked(Silent):
    """A tracker that can't stop the run: after its first failure it gets no more data, and ``note`` reports it."""

    def __init__(self, name: str, tracker: Listener, note: Callable[[str], None]) -> None:
        self._name, self._tracker, self._note, self._failed = name, tracker, note, False

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._tell("started", run, config, method, first_step, steps)

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._tell("stepped", record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._tell("evaluated", record)

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._tell("finished", summary)

    def _tell(self, event: str, *values: Any) -> None:
        if self._failed:
            return
        try:
            getattr(self._tracker, event)(*values)
        except Exception as error:  # a remote service: the packages document no list of exceptions
            self._failed = True
            reason = (str(error).splitlines() or [repr(error)])[0]
            self._note(f"{self._name} failed and gets no more data: {reason}. metrics.jsonl has everything")


def build_trackers(names: tuple[str, ...], note: Callable[[str], None]) -> list[Listener]:
    """The trackers of train.report_to; UserError before the run if a package is missing."""
    import importlib

    packages = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab")
    trackers: list[Listener] = []
    made: Callable[[Any], Listener]
    for name in names:
        if name not in packages:
            raise unknown("tracker in train.report_to", name, packages)
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"train.report_to names {name}, which is not installed: pip install 'e3rl[{name}]'"
            ) from None
        made = {"tensorboard": lambda _: TensorBoard(), "mlflow": MLflow}.get(name, ModuleTracker)
        trackers.append(Tracked(name, made(module), note))
    return trackers


_SHARE_OF_TIME = 0.02
"""Writing the page may take at most this share of a run's time."""


class ReportListener(Silent):
    """Rewrites report.html after steps, as often as the time share allows, and at the end."""

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
        except UserError as error:  # a page that can't be written must not stop the run
            self._note(f"the report was not written: {error}")
        now = time.perf_counter()
        self._next = now + (now - began) / _SHARE_OF_TIME
