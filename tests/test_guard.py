"""A guarded command ends as it would alone; one that a library ends silently ends with a sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e3rl.cli.guard import guarded
from e3rl.cli.main import main
from e3rl.config import to_toml
from e3rl.errors import UserError
from tests.train.random_lab import lab_config


def recipe(directory: Path, *overrides: str) -> str:
    path = directory / "guarded.toml"
    path.write_text(to_toml(lab_config(directory, *overrides)))
    return str(path)


def test_what_the_command_comes_to_is_what_it_comes_to_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    assert guarded(["objectives"]) == 0
    assert "grpo" in capfd.readouterr().out
    assert guarded(["train", recipe(tmp_path, "model.path=nothing-here")]) == 2
    assert "nothing-here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("end", "how"), [("os._exit(1)", "exit code 1"), ("os.kill(os.getpid(), 9)", "signal 9")], ids=["exit", "kill"]
)
def test_a_process_that_is_ended_without_a_word_is_a_sentence(tmp_path: Path, end: str, how: str):
    (tmp_path / "ends.py").write_text(f"import os\n{end}\n")
    with pytest.raises(
        UserError, match=rf"ended without an error message \({how}\)\. Ray does this when the head node.*--resume"
    ):
        guarded(["train", recipe(tmp_path), f"erasure.metric={tmp_path}/ends.py:metric"])


def test_a_run_on_ray_is_guarded_and_its_plan_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[list[str]] = []
    monkeypatch.setattr(sys.modules["e3rl.cli.main"], "guarded", lambda arguments: asked.append(arguments) or 7)
    path = recipe(tmp_path)
    for setting in ("rollout.workers=1", "train.workers=1"):
        assert main(["train", path, setting]) == 7
    assert asked == [["train", path, "rollout.workers=1"], ["train", path, "train.workers=1"]]
    assert main(["train", path, "--plan", "rollout.workers=1"]) == 0
    assert len(asked) == 2


WAITING = """
import os, time
from pathlib import Path
Path({place!r}).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_what_ends_the_guard_ends_the_command(tmp_path: Path, number: signal.Signals):
    place = tmp_path / "pid"
    (tmp_path / "waits.py").write_text(WAITING.format(place=str(place)))
    arguments = ["train", recipe(tmp_path), f"erasure.metric={tmp_path}/waits.py:metric"]
    heeds = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background job does not
    code = f"{heeds}; from e3rl.cli.guard import guarded; sys.exit(guarded({arguments!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as guard:
        try:
            wait_until(lambda: place.exists() and bool(place.read_text()))
            guard.send_signal(number)
            assert guard.wait(60) == (130 if number == signal.SIGINT else -number)
            wait_until(lambda: not running(int(place.read_text())))
        finally:
            guard.kill()


def wait_until(so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not so():
        assert time.monotonic() - began < 200
        time.sleep(0.1)


def running(process: int) -> bool:
    """Whether it is there, and no mere entry that its parent has not read yet."""
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
