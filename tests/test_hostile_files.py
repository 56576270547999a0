"""Files that mean harm: each would leave a mark if any of its code ran. None may, and what is said names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from e3rl.cli.main import main
from e3rl.config import Config, ErasureConfig, RolloutConfig, to_toml
from e3rl.errors import UserError
from e3rl.generation import generate
from e3rl.rollout.companions import RECIPE_NAME, find_companions, save_companions
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.train.replay import replay
from tests.train.random_lab import lab_config, random_lab


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A plug-in of every kind that leaves a file beside itself as soon as it is imported."""
    source = tmp_path / "canary.py"
    source.write_text("import pathlib\npathlib.Path(__file__).with_suffix('.dead').touch()\nmetric = Engine = None\n")
    return source


_SHORT = ("rollout.segment_length=4", "rollout.max_segments=2")


def _dead(canary: Path) -> bool:
    return canary.with_suffix(".dead").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_lab(), tmp_path / "model"))


def _sentence(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return said.err


def test_the_canary_dies_where_its_code_runs(canary: Path, capsys: pytest.CaptureFixture[str]):
    _sentence(capsys, ["decode", "lab", f"rollout.engine={canary}:Engine"])
    assert _dead(canary)


@pytest.mark.parametrize("setting", ["rollout.engine", "erasure.metric"])
@pytest.mark.parametrize("command", ["decode", "eval", "serve", "diagnose", "calibrate"])
def test_settings_beside_a_model_run_no_code(
    command: str, setting: str, model: Path, canary: Path, capsys: pytest.CaptureFixture[str]
):
    section, _, key = setting.partition(".")
    (model / RECIPE_NAME).write_text(f'[{section}]\n{key} = "{canary}:metric"\n')
    data = [] if command in ("decode", "serve") else ["lab:chain:1"]
    said = _sentence(capsys, [command, str(model), *data])
    assert f"{RECIPE_NAME} names code: {setting} = {canary}:metric" in said
    assert f"{setting}=" in said  # how to run it all the same
    assert not _dead(canary)


def test_the_library_runs_none_either(model: Path, canary: Path):
    (model / RECIPE_NAME).write_text(f'[erasure]\nmetric = "{canary}:metric"\n')
    with pytest.raises(UserError, match="names code"):
        generate(str(model), "1+1")
    assert not _dead(canary)


@pytest.mark.parametrize(
    "text",
    [
        "[model]\ntrust_remote_code = true\n",
        '[rewards]\nfunctions = ["evil.py:f"]\n',
        '[objective]\nname = "evil.py:F"\n',
        '[run]\noutput_dir = "/"\n',
    ],
)
def test_settings_beside_a_model_are_those_of_decoding(text: str, model: Path, capsys: pytest.CaptureFixture[str]):
    (model / RECIPE_NAME).write_text(text)
    section = text.split("]")[0]
    assert f"sets {section}]" in _sentence(capsys, ["decode", str(model), "1+1"])


def test_code_beside_a_model_runs_for_who_names_it(model: Path, canary: Path, capsys: pytest.CaptureFixture[str]):
    (model / RECIPE_NAME).write_text(f'[erasure]\nmetric = "{canary}:metric"\nkappa0 = 0.25\n')
    named = find_companions(str(model)).config(overrides=["erasure.metric=e3rl"])
    assert (named.erasure.metric, named.erasure.kappa0) == ("e3rl", 0.25)
    said = _sentence(
        capsys, ["decode", str(model), "1+1", "--samples", "2", *_SHORT, f"erasure.metric={canary}:metric"]
    )
    assert said.index("runs code that is not e3rl's") < said.index("e3rl: ")
    assert _dead(canary)


def test_a_file_of_an_earlier_version_gives_its_numbers(tmp_path: Path):
    """It holds all of [rollout] and [erasure], such as where a training's workers were."""
    rollout = RolloutConfig(segment_length=7, temperature=0.5, max_rows=4, ahead=1, workers=3, engine="vllm")
    old = to_toml(Config(rollout=rollout, erasure=ErasureConfig(kappa0=0.5), train=_AHEAD))
    (tmp_path / RECIPE_NAME).write_text(old[old.index("[rollout]") : old.index("[filter]")])
    said: list[str] = []
    config = find_companions(str(tmp_path)).config(overrides=["erasure.eta=0.5"], say=said.append)
    assert config.rollout == RolloutConfig(segment_length=7, temperature=0.5, max_rows=4)
    assert config.erasure == ErasureConfig(kappa0=0.5, eta=0.5)
    assert [line.split(": ")[1].split(" is not")[0] for line in said] == [
        "rollout.engine = vllm",
        "rollout.ahead = 1",
        "rollout.workers = 3",
    ]


_AHEAD = lab_config(Path(), "rollout.ahead=1", "train.importance_correction=token_mask").train


def test_what_is_saved_beside_a_model_is_taken_from_there(tmp_path: Path):
    rollout = RolloutConfig(segment_length=7, top_k=3, workers=2)
    save_companions(tmp_path, Config(rollout=rollout, erasure=ErasureConfig(quantile=0.25)), CalibrationStatistics({}))
    said: list[str] = []
    found = find_companions(str(tmp_path)).config(say=said.append)
    assert said == []
    assert found == Config(rollout=RolloutConfig(segment_length=7, top_k=3), erasure=ErasureConfig(quantile=0.25))


def _run(tmp_path: Path, *overrides: str) -> Path:
    """A run directory with a config alone, and a checkpoint directory as a sign that it is one."""
    config = lab_config(tmp_path, *overrides)
    run = tmp_path / config.run.name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(config))
    return run


_CODE: dict[str, Callable[[Path], str]] = {
    "objective.name": lambda canary: f"objective.name={canary}:F",
    "rewards.functions": lambda canary: f"rewards.functions=['lab', '{canary}:f']",
    "model.trust_remote_code": lambda canary: "model.trust_remote_code=true",
}


@pytest.mark.parametrize("setting", _CODE)
def test_replay_runs_no_code_that_only_the_run_names(
    setting: str,
    tmp_path: Path,
    canary: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    run = _run(tmp_path, _CODE[setting](canary))
    monkeypatch.setattr("e3rl.train.replay.chosen_step", lambda run, step: 1)
    said = _sentence(capsys, ["replay", str(run)])
    assert f"{setting}" in said
    assert f"--trust {random_lab() if setting.startswith('model') else canary}" in said
    with pytest.raises(UserError, match="--trust"):
        replay(run, None, print)
    assert not _dead(canary)
    name = said.split("--trust ")[1].strip()
    assert "step-000001 is damaged" in _sentence(capsys, ["replay", str(run), "--trust", name])


@pytest.mark.parametrize("setting", _CODE)
@pytest.mark.parametrize("command", [["train", "--resume"], ["train", "--plan"], ["rollout-server"]])
def test_a_runs_own_config_as_recipe_runs_no_code_that_only_it_names(
    command: list[str], setting: str, tmp_path: Path, canary: Path, capsys: pytest.CaptureFixture[str]
):
    run = _run(tmp_path, _CODE[setting](canary))
    said = _sentence(capsys, [command[0], str(run / "config.toml"), *command[1:]])
    assert f"config.toml names code: {setting}" in said
    assert f"name it yourself: {setting}=" in said or f"name it yourself: '{setting}=" in said
    assert not _dead(canary)
    if command == ["train", "--resume"] and setting == "objective.name":
        _sentence(capsys, ["train", str(run / "config.toml"), "--resume", _CODE[setting](canary)])
        assert _dead(canary)
