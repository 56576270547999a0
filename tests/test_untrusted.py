"""Nothing that comes from elsewhere is run as code, and no secret reaches a file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from e3rl.cli.main import main
from e3rl.config import Config, load_config
from e3rl.plugins import foreign_code
from e3rl.report.trackers import ReportListener
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config

PACKAGE = Path(__file__).parents[1] / "e3rl"
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "os.system",
    "os.popen",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
}
ALLOWED = {
    "cluster/ranks.py: all_gather_object",
    *(f"environments/jail.py: {call}" for call in ("exec", "eval", "compile")),
}
"""Ranks of one run speak in pickles, over a connection that torchrun opened between processes of the same user. The jail runs
programs that a model wrote, in a process that has confined itself before."""


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _dangers(tree: ast.AST) -> list[str]:
    """Calls and imports that can turn data into code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [n for n in names if n.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            name = _name(node.func)
            weights_only = name == "torch.load" and options.get("weights_only") is True
            found += [name] * (name in CALLS and not weights_only)
            found += [name.rpartition(".")[2]] * name.endswith(("all_gather_object", "broadcast_object_list"))
            found += [f"{name}(shell=True)"] * (options.get("shell") is True)
            found += [f"{name}(allow_pickle=True)"] * (options.get("allow_pickle") is True)
    return found


def test_no_data_becomes_code():
    found = {
        f"{path.relative_to(PACKAGE)}: {danger}"
        for path in PACKAGE.rglob("*.py")
        for danger in _dangers(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


def test_the_scan_sees_what_it_is_for():
    seen = _dangers(
        ast.parse("import pickle\ntorch.load(x)\ntorch.load(x, weights_only=True)\neval(x)\nrun(x, shell=True)")
    )
    assert seen == ["pickle", "torch.load", "eval", "run(shell=True)"]


def test_code_from_elsewhere_is_named_before_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert foreign_code(Config()) == {}
    plugin = tmp_path / "mine.py"
    plugin.write_text("import sys\nprint('I RUN', file=sys.stderr)\nraise RuntimeError('no')\n")
    arguments = [f'rewards.functions=["lab", "{plugin}:f"]', "model.trust_remote_code=true", "erasure.metric=m:metric"]
    assert main(["train", "demo", f"run.output_dir={tmp_path}", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"  rewards.functions[1] = {plugin}:f\n" in said
    assert "  erasure.metric = m:metric\n" in said
    assert "trust_remote_code = true: Python code that comes with lab" in said
    assert said.index("runs code that is not e3rl's") < said.index("can't be imported")


@pytest.mark.parametrize("command", [["eval"], ["diagnose"], ["calibrate"]])
def test_a_command_that_takes_a_model_and_problems_names_it_too(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    named = ["erasure.metric=nowhere:metric", "rewards.functions=['nowhere:reward']"]
    assert main([*command, "lab", "lab:chain:1", "--output", str(tmp_path / "out"), "eval.limit=4", *named]) == 2
    said = capsys.readouterr().err
    assert said.index("runs code that is not e3rl's") < said.index("can't be imported")


def test_a_recipe_runs_no_code_of_its_own(tmp_path: Path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nname = "$(touch owned)"\n[data]\ntrain = "`id`"\n')
    assert load_config(recipe).run.name == "$(touch owned)"


SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "E3RL_ROLLOUT_TOKEN", "OPENAI_API_KEY")


def test_no_secret_of_the_environment_reaches_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"s3cr3t-{i}-value")
    trainer = Trainer(lab_config(tmp_path, "train.steps=1"), listeners=[ReportListener(print)])
    trainer.train()
    files = [p for p in trainer.run_path.rglob("*") if p.is_file()]
    assert len(files) > 8
    assert [p.name for p in files if b"s3cr3t-" in p.read_bytes()] == []
