"""Files that mean harm: each would leave a mark if any of its code ran. None may, and what is said names the file."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from e3rl.cli.main import main
from e3rl.config import Config, ErasureConfig, RolloutConfig, TrainConfig, to_toml
from e3rl.errors import UserError
from e3rl.generation import generate
from e3rl.plugins import load
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
    rollout = RolloutConfig(segment_length=7, temperature=0.5, max_rows=4, staleness=1, workers=3, engine="vllm")
    train = TrainConfig(importance_correction="token_mask")
    old = to_toml(Config(rollout=rollout, erasure=ErasureConfig(kappa0=0.5), train=train))
    old = old.replace("staleness = 1", "ahead = 1")  # its name then
    (tmp_path / RECIPE_NAME).write_text(old[old.index("[rollout]") : old.index("[filter]")])
    said: list[str] = []
    config = find_companions(str(tmp_path)).config(overrides=["erasure.eta=0.5"], say=said.append)
    assert config.rollout == RolloutConfig(segment_length=7, temperature=0.5, max_rows=4)
    assert config.erasure == ErasureConfig(kappa0=0.5, eta=0.5)
    assert [line.split(": ")[1].split(" is not")[0] for line in said] == [
        "rollout.engine = vllm",
        "rollout.staleness = 1",
        "rollout.workers = 3",
    ]


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


def _edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _remote_code(model: Path, canary: Path) -> None:
    """Python files of the model's own, as trust_remote_code would import them."""
    shutil.copy(canary, model / "modeling_evil.py")
    (model / "modeling_evil.py").write_text(f"open({str(canary.with_suffix('.dead'))!r}, 'w')\n")
    classes = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    _edited(model / "config.json", auto_map=classes, model_type="evil")
    _edited(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", None]})


def _pickled(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": _Touch(str(canary.with_suffix(".dead")))}, model / "pytorch_model.bin")


def _template(model: Path, canary: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('"
        + str(canary.with_suffix(".dead"))
        + "') }}"
    )


def _adapter(model: Path, canary: Path) -> None:
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"})
    )


_MODELS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "code of its own": (_remote_code, "custom code"),
    "a pickle": (_pickled, "save them as safetensors"),
    "a template that leaves its sandbox": (_template, "chat template refuses it"),
    "an adapter of another model": (_adapter, "loads its weights from elsewhere"),
    **{
        f"a kernel in {key}": (
            lambda model, canary, key=key, value=value: _edited(model / "config.json", **{key: value}),
            "names code of the hub",
        )
        for key, value in {
            "_attn_implementation": "evil/kernel",
            "attn_implementation": "evil/kernel@v1:f",
            "_experts_implementation": {"": "evil/kernel"},
            "text_config": {"attn_implementation": "paged|evil/kernel"},
            "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"},
        }.items()
    },
}


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("name", _MODELS)
def test_a_models_files_run_no_code(name: str, model: Path, canary: Path, capsys: pytest.CaptureFixture[str]):
    prepare, words = _MODELS[name]
    prepare(model, canary)
    assert words in _sentence(capsys, ["decode", str(model), "1+1", "--samples", "2", *_SHORT])
    assert not _dead(canary)


def test_a_config_may_name_implementations_of_the_library(model: Path, capsys: pytest.CaptureFixture[str]):
    _edited(model / "config.json", _attn_implementation="flash_attention_2", conv_kernel=4)
    assert main(["decode", str(model), "1+1", "--samples", "2", *_SHORT]) == 0


def _tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


_NAME = "model.layers.0.mlp.up_proj.weight"
_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (
        lambda m: _tensors(m, lambda t: t[_NAME].view(-1)[5:6].fill_(math.nan)),
        f"NaN or infinity: tensor '{_NAME}'",
    ),
    "infinite": (lambda m: _tensors(m, lambda t: t[_NAME].view(-1)[5:6].fill_(math.inf)), f"tensor '{_NAME}'"),
    "missing": (lambda m: _tensors(m, lambda t: t.pop(_NAME)), f"incomplete: tensor '{_NAME}'"),
    "other shape": (lambda m: _tensors(m, lambda t: t.update({_NAME: torch.zeros(3)})), "can't be loaded"),
    "cut short": (lambda m: os.truncate(m / "model.safetensors", 5000), "model.safetensors is damaged or cut short"),
    "no tensors": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 500), "is damaged or cut short"),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), "is damaged or cut short"),
    "absent": (lambda m: (m / "model.safetensors").unlink(), "can't be loaded"),
    "no config": (lambda m: (m / "config.json").unlink(), "it holds no config.json"),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 10_000), "nested too deeply"),
    "config of 400 digits": (lambda m: _edited(m / "config.json", hidden_size=10**399), "400 digits"),
    "list for a config": (lambda m: (m / "config.json").write_text("[]"), "holds no table"),
    "odd statistics": (lambda m: (m / "e3rl_reference.json").write_text('{"format": 1, "segments": 3}'), "is damaged"),
    "NaN statistics": (lambda m: (m / "e3rl_reference.json").write_text("[NaN]"), "NaN is no number"),
}


@pytest.mark.parametrize("name", _WEIGHTS)
def test_damaged_files_of_a_model_are_a_sentence(name: str, model: Path, capsys: pytest.CaptureFixture[str]):
    damage, words = _WEIGHTS[name]
    damage(model)
    assert words in _sentence(capsys, ["decode", str(model), "1+1", "--samples", "2", *_SHORT])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./nowhere", "no such directory: './nowhere'"),
        ("runs/demo/modle", "Did you mean 'runs/demo/model'?"),
        ("labb", "Did you mean 'lab'?"),
        ("weights.gguf", "GGUF files can't be trained"),
        ("runs/demo", "Did you mean runs/demo/model?"),
        ("x" * 300, "no such directory"),
        ("caf\udce9", "no such directory"),
    ],
)
@pytest.mark.parametrize("command", [["decode"], ["serve"], ["eval"], ["calibrate"], ["train"]])
def test_a_mistyped_model_is_said_before_anything_is_loaded(
    command: list[str],
    path: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model" / "config.json").write_text("{}")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    data = ["lab:chain:1"] if command[0] in ("eval", "calibrate") else []
    arguments = [*command, "demo", f"model.path={path}"] if command == ["train"] else [*command, path, *data]
    said = _sentence(capsys, arguments)
    assert words in said or "not UTF-8" in said
    assert len(said) < 600


def test_a_mistyped_model_is_said_at_once():
    code = "import sys; from e3rl.cli import main; print(main(['decode', './nowhere']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_a_plugin_takes_no_modules_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text("value = 7\n")
    assert load("kind", f"{tmp_path / 'torch.py'}:value", {}) == 7
    assert sys.modules["torch"] is torch


def test_processes_of_ours_import_nothing_from_the_working_directory(tmp_path: Path, canary: Path):
    """As a command that was started by its script, not by ``python -m``, does not."""
    (tmp_path / "here").mkdir()
    shutil.copy(canary, tmp_path / "here" / "tomllib.py")
    code = "import sys, subprocess; sys.path[0] = '/nowhere'; from e3rl.plugins import own_python\n"
    code += "sys.exit(subprocess.run([*own_python('e3rl'), 'settings', 'run']).returncode)"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0
    assert not (tmp_path / "here" / "tomllib.dead").exists()
