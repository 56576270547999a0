"""Checkpoints are whole or absent, and a damaged one is noticed."""

import errno
import os
from pathlib import Path

import pytest
import torch

from e3rl.errors import UserError
from e3rl.files import atomic_directory, atomic_file, damage, write_text
from e3rl.train.checkpoint import Checkpoint, list_checkpoints, newest_checkpoint, read_checkpoint, save_checkpoint


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step,
        {"w": torch.full((2, 3), float(step))},
        {"w/step": torch.tensor(1.0)},
        torch.get_rng_state(),
        {"tokens": step * 10},
    )


def test_what_is_saved_comes_back(tmp_path: Path):
    save_checkpoint(tmp_path, _checkpoint(4), keep=0)
    back = newest_checkpoint(tmp_path)
    assert (back.step, dict(back.facts)) == (4, {"tokens": 40})
    assert torch.equal(back.weights["w"], torch.full((2, 3), 4.0))
    assert torch.equal(back.rng, torch.get_rng_state())


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000030", "step-000002"]


def test_an_intact_checkpoint_of_the_same_step_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill while it is replaced would leave none; found by killing runs at random moments."""
    first = save_checkpoint(tmp_path, _checkpoint(0), keep=3)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *a, **k: pytest.fail("an intact checkpoint is deleted"))
        assert save_checkpoint(tmp_path, _checkpoint(0), keep=3) == first
    (first / "state.json").unlink()
    save_checkpoint(tmp_path, _checkpoint(0), keep=3)
    assert damage(first) is None


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["truncate", "delete", "flip"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, file: str, harm: str):
    save_checkpoint(tmp_path, _checkpoint(1), keep=0)
    victim = save_checkpoint(tmp_path, _checkpoint(2), keep=0) / file
    content = victim.read_bytes()
    if harm == "delete":
        victim.unlink()
    else:
        victim.write_bytes(
            content[:-3] if harm == "truncate" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        )
    said: list[str] = []
    if file == "MANIFEST.json" and harm == "flip":  # a flipped digit of a checksum, or JSON that no longer parses
        assert damage(victim.parent)
    assert newest_checkpoint(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert "step-000002" in said[0]
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(victim.parent)


def test_with_no_intact_checkpoint_the_user_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="no intact checkpoint"):
        newest_checkpoint(tmp_path)


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        _write_half(temporary)
    assert target.read_text() == "old"
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "directory") as temporary:
        _write_half(temporary / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="no space left on the disk while writing"), atomic_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_safetensors_finds_full_is_a_sentence_too(tmp_path: Path):
    class RustError(Exception):
        """safetensors' own error is no OSError."""

    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(UserError, match="no space left on the disk while writing"), atomic_file(tmp_path / "file"):
        raise RustError(message)
    with pytest.raises(RustError), atomic_file(tmp_path / "file"):
        raise RustError("something else (os error 5)")
