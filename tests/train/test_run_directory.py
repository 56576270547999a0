"""A run directory belongs to one run; its logs survive a crash in mid-line."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.config import Config, RunConfig
from e3rl.errors import UserError
from e3rl.train.run_directory import RunDirectory, continue_or_put_aside, read_config, read_lines, survey_lines


def _config(tmp_path: Path, **train: object) -> Config:
    base = Config(run=RunConfig(name="a", output_dir=str(tmp_path)))
    return replace(base, train=replace(base.train, **train))  # type: ignore[arg-type]


def test_a_taken_directory_is_refused_with_both_ways_out(tmp_path: Path):
    RunDirectory.create(_config(tmp_path))
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*run\.name=NAME"):
        RunDirectory.create(_config(tmp_path))


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        RunDirectory.create(_config(tmp_path))


def test_resuming_needs_the_same_settings_but_for_a_few(tmp_path: Path):
    RunDirectory.create(_config(tmp_path))
    RunDirectory.resume(_config(tmp_path, steps=9))
    assert read_config(tmp_path / "a").train.steps == 9
    with pytest.raises(UserError, match=r"train\.learning_rate \(1e-06 then, 0\.1 now\)"):
        RunDirectory.resume(_config(tmp_path, steps=9, learning_rate=0.1))
    with pytest.raises(UserError, match="holds no run to resume"):
        RunDirectory.resume(_config(tmp_path / "elsewhere"))


def test_a_run_that_was_moved_is_resumed_where_it_is_now(tmp_path: Path):
    RunDirectory.create(_config(tmp_path)).release()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Config(run=RunConfig(name="b", output_dir=str(tmp_path)))
    RunDirectory.resume(moved)
    assert read_config(tmp_path / "b") == moved


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("train", "micro_batch_tokens", 512),
        ("train", "gradient_checkpointing", True),
        ("rollout", "max_rows", 8),
        ("rollout", "kv_budget", 100),
        ("rewards", "workers", 4),
        ("model", "device", "cpu"),
    ],
)
def test_a_run_that_ran_out_of_memory_or_time_goes_on_with_less(
    tmp_path: Path, section: str, setting: str, value: object
):
    config = _config(tmp_path)
    RunDirectory.create(config)
    smaller = replace(config, **{section: replace(getattr(config, section), **{setting: value})})
    RunDirectory.resume(smaller)
    assert read_config(tmp_path / "a") == smaller


def test_logs_can_be_cut_back_and_a_half_written_line_is_left_out(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    for step in (1, 2, 3):
        run.append("metrics.jsonl", {"step": step, "reward": float("nan"), "series": [1.0, float("inf")]})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert [r["step"] for r in read_lines(run.path / "metrics.jsonl")] == [1, 2, 3]
    assert read_lines(run.path / "metrics.jsonl")[0] == {"step": 1, "reward": None, "series": [1.0, None]}
    said: list[str] = []
    run.drop_after(2, said.append)
    assert [r["step"] for r in read_lines(run.path / "metrics.jsonl")] == [1, 2]
    assert said == [], "a last line cut short is what a kill leaves: no damage"


def test_a_damaged_line_costs_itself_alone_and_a_copy_of_the_file_is_kept(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    for step in range(1, 6):
        run.append("metrics.jsonl", {"step": step, "reward": 0.5})
    log = run.path / "metrics.jsonl"
    damaged = log.read_bytes().replace(b'{"step": 2', b'{"st\xffp": 2')
    log.write_bytes(damaged)
    said: list[str] = []
    run.drop_after(4, said.append)
    assert [r["step"] for r in read_lines(log)] == [1, 3, 4]
    assert (run.path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert ["can't read line 2" in said[0], "nothing is logged of step 2;" in said[1], len(said)] == [True, True, 2]
    log.write_bytes(damaged)
    run.drop_after(4, said.append)
    assert (run.path / "metrics.jsonl.damaged.1").exists(), "an older copy is not written over"


def test_a_changed_digit_is_noticed(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    for step in (1, 2):
        run.append("metrics.jsonl", {"step": step, "reward": 0.5})
    log = run.path / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 1, "reward": 0.5', b'"step": 1, "reward": 0.7'))
    assert [survey_lines(log)[1], read_lines(log)] == [[1], [{"step": 2, "reward": 0.5}]]
    log.write_text('{"step": 1, "reward": 0.7}\n{"step": 2}\n')
    assert read_lines(log)[0] == {"step": 1, "reward": 0.7}, "a log without checksums is read as it is"


def test_no_damaged_byte_of_a_log_of_one_line_is_believed(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    run.append("metrics.jsonl", {"step": 1, "reward": 0.5})
    log = run.path / "metrics.jsonl"
    whole = log.read_bytes()
    for place in range(len(whole) - 1):  # the last byte is the line's end
        for flip in (1, 2, 8, 32):
            log.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert (read_lines(log), survey_lines(log)[1]) == ([], [1]), (place, flip)


def test_a_log_that_is_gone_is_said(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    said: list[str] = []
    run.drop_after(3, said.append)
    assert ["nothing is logged of step 1 to 3" in text for text in said] == [True]


def test_evaluations_that_are_gone_are_said_wherever_the_file_was_cut(tmp_path: Path):
    run = RunDirectory.create(_config(tmp_path))
    for step in (1, 2):
        run.append("metrics.jsonl", {"step": step})
    for step in (0, 1, 2, 4):
        run.append("evaluations.jsonl", {"step": step, "avg@1": 0.5})
    log, said = run.path / "evaluations.jsonl", []
    run.drop_after(2, said.append, evaluations=2)
    assert said == []
    whole = log.read_bytes()
    for cut in (whole.index(b"\n") + 1, 5):
        log.write_bytes(whole[:cut])
        run.drop_after(2, said.append, evaluations=2)
    assert [text.partition("evaluations.jsonl: ")[2][:22] for text in said] == [
        "1 of 2 evaluations bef",
        "2 of 2 evaluations bef",
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "/tmp/x", "a\\b"])
def test_a_run_stays_in_its_output_directory(tmp_path: Path, name: str):
    config = Config(run=RunConfig(name=name, output_dir=str(tmp_path / "runs")))
    with pytest.raises(UserError, match="must be the name of one directory"):
        RunDirectory.create(config)
    assert list(tmp_path.iterdir()) == []


def test_again_continues_what_is_unfinished_and_puts_aside_what_is_done(tmp_path: Path):
    config = _config(tmp_path)
    assert not continue_or_put_aside(config)
    run = RunDirectory.create(config)
    (run.path / "checkpoints" / "step-000001").mkdir(parents=True)
    assert continue_or_put_aside(config)
    (run.path / "summary.json").write_text("{}")
    assert not continue_or_put_aside(config)
    assert not run.path.exists()
    assert (tmp_path / "a.1" / "summary.json").exists()
    RunDirectory.create(config)
    assert not continue_or_put_aside(config)  # no checkpoint: nothing to continue
    assert (tmp_path / "a.2").exists()


_HOLDER = (
    "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


def test_a_directory_that_another_process_trains_in_is_refused(tmp_path: Path):
    config = _config(tmp_path)
    RunDirectory.create(config).release()
    (tmp_path / "a" / "summary.json").write_text("{}")
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        for take in (RunDirectory.resume, continue_or_put_aside):
            with pytest.raises(UserError, match=r"another process is training in .*/a: wait until it ends"):
                take(config)
        holder.kill()
    RunDirectory.resume(config)


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path):
    done = subprocess.Popen(["true"])
    done.wait()
    litter, living = f".config.toml.{done.pid}.tmp", f".x.{os.getppid()}.tmp"
    (tmp_path / "a" / "checkpoints" / f".step-000002.{done.pid}.tmp").mkdir(parents=True)
    (tmp_path / "a" / litter).write_text("half")
    with pytest.raises(UserError, match="not an empty directory"):
        RunDirectory.create(_config(tmp_path))
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    run = RunDirectory.create(_config(tmp_path))  # killed before there was a config.toml: as if it had not begun
    assert [p.name for p in run.path.iterdir()] == ["config.toml"]
    run.release()
    (run.path / "checkpoints" / f".step-000002.{done.pid}.tmp").mkdir(parents=True)
    (run.path / living).write_text("somebody is writing this")
    RunDirectory.resume(_config(tmp_path))
    assert sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*")) == [living, "checkpoints", "config.toml"]
