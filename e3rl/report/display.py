"""A run in the terminal: a live panel, or one line for each step without a terminal; then a summary."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.evaluate.figures import evaluated_name
from e3rl.evaluate.tables import results_table
from e3rl.report.health import RECENT, Logs, examine
from e3rl.train.ledger import read_ledger
from e3rl.train.listeners import Silent
from e3rl.train.run_directory import read_lines

_BARS = "▁▂▃▄▅▆▇█"
LOOKED_THROUGH = 20  # ledgers in which the erasure to show is looked for
_QUIET_SECONDS = 30.0  # without output before a progress line is printed (no panel)


def duration(seconds: float) -> str:
    """Readable duration: 4 s, 3 min 20 s, 2 h 5 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sparkline(values: list[float], width: int = 40) -> str:
    """The last ``width`` values as bars between their smallest and largest; non-finite values are left out."""
    shown = [v for v in values if math.isfinite(v)][-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[round((v - low) / span * (len(_BARS) - 1))] for v in shown)


def step_line(record: Mapping[str, Any], steps: int, left: float) -> str:
    """One step in one line, the most important values first: a narrow terminal cuts the end. Unknown values are left out."""
    parts = [f"step {record['step']}/{steps}", f"reward {record['reward']:.3f}"]
    if _known(record, "accuracy") and record["accuracy"] != record["reward"]:
        parts.append(f"accuracy {record['accuracy']:.3f}")
    parts += [f"{label} {record[name]:.{digits}g}" for name, label, digits in _LEARNT if _known(record, name)]
    if _known(record, "calls"):
        parts.append(f"calls {record['calls']:.2f}  erased calls {record['erased_turns']:.0f}")
    parts += [f"r {record['r']:.2f}", f"{duration(left)} left", f"erase rate {record['erase_rate']:.3f}"]
    return "  ".join([*parts, f"{record['tokens_per_second']:.0f} tokens/s"])


_LEARNT = (("loss", "loss", 2), ("kl", "kl", 2), ("grad_norm", "grad", 2))


def _known(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """One evaluation in one line."""
    k, (low, high) = record["samples"], record["ci95"]
    return (
        f"held-out after step {record['step']}, {evaluated_name(record)}: Avg@{k} {record[f'avg@{k}']:.3f} "
        f"({low:.3f} to {high:.3f})  Pass@{k} {record[f'pass@{k}']:.3f}  r {record['r']:.3f}"
    )


class _Clock:
    """Time left, from the mean of the steps done in this process."""

    def __init__(self, first_step: int, steps: int) -> None:
        self._began, self._first, self._steps = time.perf_counter(), first_step, steps

    def left(self, step: int) -> float:
        done = step - self._first + 1
        return (time.perf_counter() - self._began) / done * (self._steps - step)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


class PlainDisplay(Silent):
    """For pipes, logs and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = time.monotonic()

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self._clock, self._steps = _Clock(first_step, steps), steps
        self._say(f"{method}: training {config.model.path} on {config.data.trained_on}, {_steps(steps)}, in {run}")

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._say(step_line(record, self._steps, self._clock.left(record["step"])))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._say(evaluation_line(record))

    def progressed(self, activity: str, done: int, of: int) -> None:
        """A progress line from time to time, for logs."""
        now = time.monotonic()
        if of and now - self._said > _QUIET_SECONDS:
            self._say(f"  {activity}: {done}/{of}")

    def noted(self, text: str) -> None:
        self._say(text)

    def close(self) -> None:
        """Nothing to release: plain lines don't own the terminal."""

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay(PlainDisplay):
    """A panel that is redrawn in place, below a line for every step, evaluation and note."""

    _live: Live | None = None

    def started(self, run: Path, config: Config, method: str, first_step: int, steps: int) -> None:
        self.close()  # a run that was restarted
        super().started(run, config, method, first_step, steps)
        self._rewards: list[float] = []
        self._record: Mapping[str, Any] = {}
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), expand=True
        )
        self._steps_task = self._bar.add_task("steps", total=steps, completed=first_step - 1)
        self._work_task = self._bar.add_task("starting", total=None)
        self._title = f"{method} · {config.run.name}"
        self._live = Live(self._panel(), console=self._console, refresh_per_second=8, transient=True)
        self._live.start()

    def progressed(self, activity: str, done: int, of: int) -> None:
        self._bar.update(self._work_task, description=activity, completed=done, total=of or None)
        self._redraw()

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._record = record
        self._rewards.append(record["reward"])
        self._bar.update(self._steps_task, completed=record["step"])
        line = step_line(record, self._steps, self._clock.left(record["step"]))
        self._console.print(Text(line), no_wrap=True, overflow="ellipsis", highlight=False)
        self._redraw()

    def finished(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._live:
            self._live.stop()

    def _redraw(self) -> None:
        if self._live:
            self._live.update(self._panel())

    def _panel(self) -> Panel:
        figures = Table.grid(expand=True, padding=(0, 1))
        shown = {name: (label, form) for name, label, form in _FIGURES if _known(self._record, name)}
        for _ in range(len(shown) + 1):
            figures.add_column(justify="center", no_wrap=True)
        if self._record:
            left = duration(self._clock.left(self._record["step"]))
            figures.add_row(*(Text(label, style="dim") for label, _ in shown.values()), Text("left", style="dim"))
            figures.add_row(*(format(self._record[name], form) for name, (_, form) in shown.items()), left)
        line = Text(sparkline(self._rewards), style="cyan")
        return Panel(Group(self._bar, figures, line), title=self._title, border_style="cyan")


_FIGURES = (
    ("reward", "reward", ".3f"), ("accuracy", "accuracy", ".3f"), ("loss", "loss", ".2g"), ("kl", "kl", ".2g"),
    ("grad_norm", "grad norm", ".2g"), ("r", "r", ".2f"), ("tokens_per_second", "tokens/s", ".0f"),
)  # fmt: skip


def build_display(console: Console) -> PlainDisplay:
    """The live panel on a terminal, plain lines elsewhere."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def telling_erasure(run: Path) -> Mapping[str, Any] | None:
    """The erasure to show: in a late, rewarded trajectory, one that changed the text, the furthest above its threshold."""
    unchanged = None
    for ledger in sorted((run / "rollouts").glob("step-*.parquet"), reverse=True)[:LOOKED_THROUGH]:
        try:
            rows = read_ledger(ledger, ["prompt", "reward", "segments", "erasures"]).to_pylist()
        except UserError:  # `e3rl doctor` names it
            continue
        found = [(e, row) for row in rows if (row["reward"] or 0) > 0 for e in row["erasures"] if _replacement(e, row)]
        if not found:
            continue
        erasure, row = max(found, key=lambda pair: (_changed(*pair), pair[0]["uncertainty"] / pair[0]["threshold"]))
        if _changed(erasure, row):
            return {"erasure": erasure, "row": row}
        unchanged = unchanged or {"erasure": erasure, "row": row}
    return unchanged


def _changed(erasure: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    replaced = _replacement(erasure, row)
    return replaced is not None and replaced["text"] != erasure["text"]


def _replacement(erasure: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The judged segment that replaced an erased one; a redrawn turn may have fewer segments."""
    judged = (s for s in row["segments"] if s["uncertainty"] is not None)
    return next((s for s in judged if s["index"] == erasure["index"]), None)


def erasure_text(example: Mapping[str, Any]) -> Text:
    """The prompt and prefix, the erased segment struck through, and what replaced it."""
    erasure, row = example["erasure"], example["row"]
    replaced = _replacement(erasure, row)
    assert replaced is not None
    prefix = "".join(s["text"] for s in row["segments"] if s["index"] < erasure["index"])
    measured, threshold = erasure["uncertainty"], erasure["threshold"]
    digits = next((n for n in range(3, 9) if f"{measured:.{n}f}" != f"{threshold:.{n}f}"), 9)
    return Text.assemble(
        ("An erased segment and what replaced it\n", "bold"),
        (f"  prompt    {row['prompt']!r}\n", "dim"),
        f"  prefix    {prefix!r}\n",
        "  erased    ",
        (repr(erasure["text"]), "red strike"),
        f"  U {measured:.{digits}f} above threshold {threshold:.{digits}f}\n",
        "  replaced  ",
        (repr(replaced["text"]), "green"),
        f"  U {replaced['uncertainty']:.{digits}f}\n",
    )


def first_to_last(run: Path) -> str:
    """Training reward and, if known, accuracy: the mean of the first steps and of the last."""
    records = read_lines(run / "metrics.jsonl")
    if len(records) < 2:
        return ""
    few = min(RECENT, len(records) // 2)
    parts = []
    same = all(not _known(r, "accuracy") or r["accuracy"] == r["reward"] for r in records)
    for name in ("reward",) if same else ("reward", "accuracy"):
        first, last = ([r[name] for r in part if _known(r, name)] for part in (records[:few], records[-few:]))
        if first and last:
            parts.append(f"{name} {sum(first) / len(first):.3f} → {sum(last) / len(last):.3f}")
    steps = f"the first {few} steps → the last {few}" if few > 1 else "the first step → the last"
    return f"training, {steps}: {', '.join(parts)}" if parts else ""


_SIGNS = {"bad": ("✗", "red"), "warn": ("!", "yellow"), "good": ("✓", "green"), "note": ("·", "dim")}


def closing(run: Path, config: Config, summary: Mapping[str, Any]) -> RenderableType:
    """Everything that is printed when a run is complete."""
    parts: list[RenderableType] = [Text("")]
    if summary["after"]:
        modes = summary["after"]
        rows = [(f"{m}, {when}", summary[when][m]) for m in modes for when in ("before", "after") if m in summary[when]]
        parts.append(results_table("Held-out problems", rows))
    if line := first_to_last(run):
        parts.append(Text(line + "\n"))
    example = telling_erasure(run)
    if example:
        parts.append(erasure_text(example))
    logs = Logs(read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl"), config)
    for finding in examine(logs):
        sign, style = _SIGNS[finding.level]
        parts.append(Text.assemble((f"{sign} ", style), finding.text))
    parts.append(
        Text(
            f"\n{summary['method']}, {_steps(summary['steps'])} in {duration(summary['train_seconds'])}: erase rate "
            f"{summary['erase_rate']:.3f}, r {summary['r']:.3f}, {summary['tokens_generated']} tokens generated\n"
            f"run     {run}\nmodel   {run / 'model'}\nreport  {run / 'report.html'}"
        )
    )
    return Group(*parts)
