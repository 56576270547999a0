"""What a run says in the terminal: a line for every step, phases, and what it came to."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from e3rl.config import Config
from e3rl.report import display
from e3rl.report.display import LiveDisplay, PlainDisplay, closing, first_to_last, step_line


def record(step: int, **others: Any) -> dict[str, Any]:
    known = {
        "reward": 0.5, "accuracy": 0.25, "loss": -0.0123, "kl": 0.00456, "grad_norm": 1.234, "r": 0.1, "erase_rate": 0.09,
        "tokens_per_second": 812.4, "finish_ratio": 1.0, "degenerate_groups": 0.0,
    }  # fmt: skip
    return {"step": step, **known, **others}


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_step_s_line_has_the_most_telling_figures_within_eighty_columns():
    line = step_line(record(12), 50, 200.0)
    assert line == (
        "step 12/50  reward 0.500  accuracy 0.250  loss -0.012  kl 0.0046  grad 1.2  r 0.10  3 min 20 s left  "
        "erase rate 0.090  812 tokens/s"
    )
    assert line.index("  r 0.10") < 80


@pytest.mark.parametrize("accuracy", [None, math.nan, 0.5])
def test_accuracy_that_is_unknown_or_the_reward_again_is_not_said(accuracy: float | None):
    assert "accuracy" not in step_line(record(1, accuracy=accuracy, kl=None), 2, 1.0)
    assert "kl" not in step_line(record(1, accuracy=accuracy, kl=None), 2, 1.0)


def test_the_panel_leaves_a_line_for_every_step_and_names_the_phase():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    live = LiveDisplay(console)
    live.started(Path("runs/x"), Config(), "GRPO", 1, 2)
    live.stepped(record(1))
    live.progressed("reward", 0, 0)
    console.file.truncate(0)
    live.progressed("training", 0, 0)
    panel = Console(file=io.StringIO(), width=80, color_system=None)
    panel.print(live._panel())
    text = shown(panel)
    assert "training" in text
    assert max(map(len, text.splitlines())) == 80
    for word in ("reward", "0.500", "loss", "-0.012", "kl", "grad norm", "tokens/s"):
        assert word in text, text
    live.stepped(record(2))
    live.close()
    assert "step 2/2  reward 0.500" in shown(console)


def test_where_there_is_no_terminal_a_long_phase_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    plain = PlainDisplay(console)
    for seconds, done in ((10, 1), (40, 2), (50, 3), (80, 4)):
        now[0] = seconds
        plain.progressed("rollout", done, 9)
    assert shown(console).split("\n") == ["  rollout: 2/9", "  rollout: 4/9", ""]


def _run(path: Path, rewards: list[float], accuracy: float | None = 0.0) -> Path:
    path.mkdir()
    lines = [record(i + 1, reward=r, accuracy=accuracy) for i, r in enumerate(rewards)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_end_says_what_training_changed(tmp_path: Path):
    assert first_to_last(_run(tmp_path / "a", [0.0, 0.2, 0.4, 0.6])) == (
        "training, the first 2 steps → the last 2: reward 0.100 → 0.500, accuracy 0.000 → 0.000"
    )
    assert first_to_last(_run(tmp_path / "b", [0.0, 0.2], None)) == (
        "training, the first step → the last: reward 0.000 → 0.200"
    )
    assert first_to_last(_run(tmp_path / "c", [0.5])) == ""
    assert "accuracy" not in first_to_last(_run(tmp_path / "d", [0.5, 0.5], 0.5))


def test_the_erasure_shown_is_one_that_changed_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def row(erased: str, uncertainty: float, reward: float = 1.0) -> dict[str, Any]:
        kept = {"index": 0, "text": "=24", "uncertainty": 0.1}
        erasure = {"index": 0, "text": erased, "uncertainty": uncertainty, "threshold": 0.1}
        return {"prompt": "p", "reward": reward, "segments": [kept], "erasures": [erasure]}

    steps = {1: [row("=25", 0.2)], 2: [row("=24", 0.9), row("=26", 0.3), row("=27", 0.4), row("=28", 0.8, 0.0)]}
    steps[3] = [row("=24", 0.9)]
    (tmp_path / "rollouts").mkdir()
    for step in steps:
        (tmp_path / "rollouts" / f"step-{step}.parquet").touch()
    read = lambda path, columns: pa.Table.from_pylist(steps[int(path.stem[-1])])  # noqa: E731
    monkeypatch.setattr(display, "read_ledger", read)
    found = display.telling_erasure(tmp_path)
    assert found is not None
    assert found["erasure"]["text"] == "=27"
    del steps[1], steps[2]
    monkeypatch.setattr(display, "read_ledger", lambda path, columns: pa.Table.from_pylist(steps[3]))
    found = display.telling_erasure(tmp_path)
    assert found is not None
    assert found["erasure"]["text"] == "=24"


def test_what_was_erased_has_the_digits_that_tell_it_from_its_threshold():
    kept = {"index": 0, "text": "=25", "uncertainty": 0.1}
    for measured, told in ((0.15302, "U 0.1530 above threshold 0.1527"), (0.2, "U 0.200 above threshold 0.153")):
        erasure = {"index": 0, "text": "=24", "uncertainty": measured, "threshold": 0.15271}
        row = {"prompt": "p", "reward": 1.0, "segments": [kept], "erasures": [erasure]}
        assert told in display.erasure_text({"erasure": erasure, "row": row}).plain


def test_the_end_has_the_health_lines(tmp_path: Path):
    run = _run(tmp_path / "a", [0.1] * 4)
    summary = {
        "method": "GRPO", "after": {}, "before": {}, "steps": 4, "train_seconds": 61.0, "erase_rate": 0.0, "r": 0.0,
        "tokens_generated": 9,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    console.print(closing(run, Config(), summary))
    text = shown(console)
    assert "GRPO, 4 steps in 1 min 1 s" in text
    assert "✓ Nothing looks wrong." in text
