"""`e3rl doctor`: each kind of damage is named, and repaired where that is safe."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from e3rl.cli.main import main
from e3rl.config import Config, RunConfig
from e3rl.doctor.finding import CheckResult
from e3rl.doctor.machine import check_exact, check_machine
from e3rl.doctor.run import check_run
from e3rl.train.checkpoint import Checkpoint, save_checkpoint
from e3rl.train.journal import FORMAT, StepJournal
from e3rl.train.ledger import SCHEMA
from e3rl.train.run_directory import RunDirectory
from e3rl.types import Candidate, Draw


def _run(tmp_path: Path) -> Path:
    """A healthy unfinished run of three steps."""
    config = replace(Config(), run=RunConfig(name="a", output_dir=str(tmp_path)))
    directory = RunDirectory.create(config)
    for step in (1, 2, 3):
        directory.append("metrics.jsonl", {"step": step})
        path = directory.path / "rollouts" / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), path)
    for step in (0, 2):
        weights = {"w": torch.full((3,), float(step))}
        save_checkpoint(directory.path, Checkpoint(step, weights, weights, torch.get_rng_state(), {}), keep=0)
    journal = StepJournal(directory.path / "journal" / "step-000004.journal", {"format": FORMAT, "step": 4}, print)
    journal.add(Draw(0, 4, "p", 0, 0, 0), Candidate((1,), (0.5,), (1.0,), (0.0,), (1.0,), (1,), False))
    journal.close()
    directory.release()
    return directory.path


def _problems(run: Path) -> list[CheckResult]:
    return [f for f in check_run(run) if f.kind == "problem"]


def test_a_healthy_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = _run(tmp_path)
    assert main(["doctor", str(run)]) == 0
    said = capsys.readouterr().out
    assert "ok       metrics.jsonl: 3 lines" in said
    assert "ok       journal/step-000004.journal: 1 candidates" in said
    assert "note     state: unfinished, 3 steps logged; --resume continues from step-000002" in said
    (run / "summary.json").write_text(json.dumps({"steps": 3}))
    assert main(["doctor", str(run)]) == 0
    assert "finished after 3 steps" in capsys.readouterr().out


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


HARMS = {
    "metrics.jsonl": lambda run: _half(run / "metrics.jsonl"),
    "rollouts/step-000002.parquet": lambda run: _half(run / "rollouts" / "step-000002.parquet"),
    "checkpoints/step-000002": lambda run: _half(run / "checkpoints" / "step-000002" / "weights.safetensors"),
    "summary.json": lambda run: (run / "summary.json").write_text("{"),
}


@pytest.mark.parametrize("subject", HARMS)
def test_damage_is_named_and_repaired(tmp_path: Path, subject: str, capsys: pytest.CaptureFixture[str]):
    run = _run(tmp_path)
    HARMS[subject](run)
    assert subject in [f.subject for f in _problems(run)]
    assert main(["doctor", str(run)]) == 1
    assert f"PROBLEM  {subject}: " in capsys.readouterr().out
    main(["doctor", str(run), "--repair"])
    assert "put right: 1 of 1" in capsys.readouterr().out
    assert subject not in [f.subject for f in _problems(run)]


def test_repair_keeps_a_copy_of_a_damaged_log(tmp_path: Path):
    run = _run(tmp_path)
    damaged = (run / "metrics.jsonl").read_bytes().replace(b'"step": 2', b'"step": ?')
    (run / "metrics.jsonl").write_bytes(damaged)
    main(["doctor", str(run), "--repair"])
    assert (run / "metrics.jsonl").read_bytes() == b"".join(damaged.splitlines(keepends=True)[::2])
    assert (run / "metrics.jsonl.damaged").read_bytes() == damaged


def test_a_missing_log_is_named(tmp_path: Path):
    run = _run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in [f.subject for f in _problems(run)]


def test_what_can_not_be_repaired_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = _run(tmp_path)
    (run / "rollouts" / "step-000001.parquet").unlink()
    (run / "config.toml").write_text("[run")
    assert main(["doctor", str(run), "--repair"]) == 1
    said = capsys.readouterr().out
    assert "the rollouts of step 1 are missing" in said
    assert "config.toml is damaged" in said
    assert "put right: 0 of 2" in said


def test_rollouts_of_another_format_are_no_damage_to_guess_at(tmp_path: Path):
    run = _run(tmp_path)
    path = run / "rollouts" / "step-000001.parquet"
    pq.write_table(pa.Table.from_pylist([], schema=SCHEMA.with_metadata({"format": "9"})), path)
    assert [f.text for f in _problems(run)] == ["has format 9; this version reads 1 and 2 and 3"]


def test_half_written_files_are_removed_by_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = _run(tmp_path)
    done = subprocess.Popen(["true"])
    done.wait()
    litter = run / "checkpoints" / f".step-000004.{done.pid}.tmp"
    litter.mkdir()
    assert main(["doctor", str(run), "--repair"]) == 0
    assert "1 half-written files of a killed process" in capsys.readouterr().out
    assert not litter.exists()


def test_the_machine(tmp_path: Path):
    findings = list(check_machine(tmp_path))
    subjects = {f.subject for f in findings}
    assert {"torch", "transformers", "cores", "memory", "disk", "gpu", "exactness", "rewards", "optional"} <= subjects
    assert {f.subject: f.kind for f in findings}["rewards"] == "ok"


def test_exactness_is_measured(monkeypatch: pytest.MonkeyPatch):
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: real(x, w) + (len(x) < 8) * 1e-6)
    assert [f.kind for f in check_exact()] == ["note"]


def test_misuse_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--repair"]) == 2
    assert "--repair needs a run directory" in capsys.readouterr().err
    assert main(["doctor", "/no/such/run"]) == 2
    assert "/no/such/run is no directory" in capsys.readouterr().err
