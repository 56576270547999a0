"""The command line: bad input ends in one sentence and exit code 2, never in a traceback; help is at hand and quick."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from e3rl.cli import main
from e3rl.cli.decode import LAB_PROBLEM
from e3rl.config import Config, load_config
from e3rl.generation import generate as decode
from e3rl.lab import lab_directory
from e3rl.lab.problems import generate, half
from e3rl.rollout.companions import find_companions
from e3rl.rollout.statistics import CalibrationStatistics

TINY_RUN = [
    "data.train=lab:chain:1", "data.train_limit=4", "rollout.num_generations=2", "rollout.segment_length=6",
    "rollout.max_segments=2", "rewards.functions=['lab']", "train.steps=1", "train.prompts_per_step=2", "eval.limit=2",
    "eval.num_samples=2",
]  # fmt: skip


def _recipe(tmp_path: Path, text: str = "") -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    notices, sentence, error = captured.err.partition("e3rl: ")
    assert not notices or notices.startswith("This config runs code that is not e3rl's:\n  ")
    assert "Traceback" not in captured.err + captured.out
    return sentence + error


def test_help_names_every_command_and_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in ("learning_rate", "perturbation_weight", "num_generations", "--resume"):
        assert name in text


def test_settings_explains_all_of_them(capsys: pytest.CaptureFixture[str]):
    assert main(["settings"]) == 0
    text = capsys.readouterr().out
    assert "max_erasures = 5" in text
    assert "[paper, app. D]" in text
    assert all(f"[{section}]" in text for section in vars(Config()))
    assert "Did you mean 'erasure'?" in _fails(capsys, ["settings", "erasur"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rolout.erase=true", "Did you mean 'rollout'?"),
        ("train.learning_rate=fast", "train.learning_rate: expected a number"),
        ("rollout.num_generations=1", "at least 2 samples"),
        ("objective.name=grop", "Did you mean 'grpo'?"),
        ("objective.clip_lo=0.1", "clip_lo"),
        ("data.train=nothing.jsonl", "nothing.jsonl"),
        ("data.train=lab:chian", "Did you mean 'chain'?"),
        ("rewards.functions=['mth']", "Did you mean 'math'?"),
        ("rewards.functions=['nowhere:f']", "nowhere"),
        ("model.path=./no-such-model", "no such directory: './no-such-model'"),
        ("model.device=tpu9", "model.device"),
        ("rollout.engine=fast", "unknown engine 'fast'"),
        ("rollout.segment_length=4000", "context"),
        ("rollout.cache_rows=1", "cache_rows"),
        ("train.report_to=['paper']", "unknown tracker"),
    ],
)
def test_a_wrong_setting_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str, words: str):
    arguments = [*TINY_RUN, f"run.output_dir={tmp_path / 'runs'}", setting]
    assert words in _fails(capsys, ["train", _recipe(tmp_path), *arguments])
    assert not (tmp_path / "runs").exists()  # found before anything was written


@pytest.mark.parametrize(
    ("misspelt", "words"),
    [
        (["train.steps"], "'train.steps' is no override"),
        (["train.steps", "=", "2"], "'train.steps' is no override"),
        (["learning_rate=3"], "'learning_rate=3' is no override"),
        (["Train.steps=2"], "Did you mean 'train'?"),
        (["train.learning-rate=2"], "Did you mean 'learning_rate'?"),
        (["overlay.toml"], "'overlay.toml' is no override"),
    ],
)
def test_an_argument_that_is_no_setting_is_refused_and_not_passed_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, misspelt: list[str], words: str
):
    arguments = [*TINY_RUN, f"run.output_dir={tmp_path / 'runs'}", *misspelt]
    assert words in _fails(capsys, ["train", _recipe(tmp_path), *arguments])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["doctor", "run"], ["compare", "a", "b"], ["grade", "pairs.jsonl"]])
def test_a_command_without_settings_refuses_them(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit) as left:
        main([*arguments, "train.steps=2"])
    assert left.value.code == 2
    assert "unrecognized arguments: train.steps=2" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_or_broken(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "no such recipe file: gone.toml" in _fails(capsys, ["train", "gone.toml"])
    assert "Did you mean 'demo'?" in _fails(capsys, ["train", "dmo"])
    assert "not valid TOML" in _fails(capsys, ["train", _recipe(tmp_path, "[train\n")])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "no rows"),
        ('{"question": "1+1", "answer": "2"}\n', "prompt"),
        ('{"prompt": "1+1", "answer": "2"}\nnot json\n', "data.jsonl:2"),
        ('{"prompt": "", "answer": "2"}\n', "empty"),
        (json.dumps({"prompt": "1+" * 400, "answer": "2"}) + "\n", "tokens"),
    ],
)
def test_data_that_can_not_be_used_names_the_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: str, words: str
):
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    error = _fails(capsys, ["train", _recipe(tmp_path), *TINY_RUN, f"data.train={data}", f"run.output_dir={tmp_path}"])
    assert words in error


def test_a_reward_function_in_a_file_is_used_unchanged_and_its_failures_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    source = tmp_path / "mine.py"
    source.write_text(
        "def good(completions, answer, **columns):\n    return [float(a in str(c)) for c, a in zip(completions, answer)]\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def none(completions, **columns):\n    return [None] * len(completions)\n"
    )
    run = ["train", _recipe(tmp_path), *TINY_RUN, f"run.output_dir={tmp_path}"]
    assert main([*run, f"rewards.functions=['{source}:good']", "run.name=good"]) == 0
    expected = {"short": "returned 1 values for 2", "nan": "nan", "none": "no reward function gave a value"}
    for name, words in expected.items():
        error = _fails(capsys, [*run, f"rewards.functions=['{source}:{name}']", f"run.name=run-{name}"])
        assert words in error


def test_a_run_directory_that_is_taken_is_refused_and_again_puts_it_aside(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    run = ["train", _recipe(tmp_path), *TINY_RUN, f"run.output_dir={tmp_path}", "run.name=x", "eval.erasable=false"]
    assert main(run) == 0
    assert "Held-out problems" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patched:  # said before data or weights are read
        patched.setattr("e3rl.train.trainer.load_outline", lambda model: pytest.fail("the model is loaded first"))
        assert "already holds a run" in _fails(capsys, run)
        assert "was started with other settings" in _fails(capsys, [*run, "run.seed=9", "--resume"])
    assert main([*run, "--again"]) == 0
    assert (tmp_path / "x.1" / "summary.json").exists()
    assert (tmp_path / "x" / "report.html").exists()


def test_decode_plain_and_erasable_and_as_json(capsys: pytest.CaptureFixture[str]):
    assert main(["decode", "lab", "12+7-3:", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "".join(s["text"] for s in record["segments"]) == record["response"]
    assert main(["decode", "lab", "12+7-3:", "--plain", "--samples", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["erasures"] for line in lines] == [[], []]
    assert main(["decode", "lab", "--samples", "4", "--overlay", "paper-uncertainty", "erasure.kappa0=-3"]) == 0
    out = capsys.readouterr().out
    assert "~~" in out
    assert "segments erased" in out
    assert "--samples must be at least 1" in _fails(capsys, ["decode", "lab", "--samples", "0"])


@pytest.mark.parametrize("prompt", ["", " ", "-"])
def test_an_empty_prompt_is_not_taken_for_another(
    prompt: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert _fails(capsys, ["decode", "lab", prompt]) == "e3rl: the prompt is empty\n"


def test_eval_writes_its_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    arguments = [
        "eval",
        "lab",
        "lab:chain:1",
        "--erase",
        "eval.limit=3",
        "eval.num_samples=2",
        "rewards.functions=['lab']",
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert 0 <= figures["plain"]["avg@2"] <= figures["plain"]["pass@2"] <= 1
    assert figures["erasable"]["problems"] == 3
    assert "erasable" in capsys.readouterr().out


def test_single_samples_of_the_recommended_recipe_are_judged_by_calibrated_quantiles(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    model = str(shutil.copytree(lab_directory(), tmp_path / "model"))
    assert main(["calibrate", model, "lab:path:2", "--prompts", "8", "--recipe", "recommended"]) == 0
    told = capsys.readouterr().out
    assert "Recommended: erasure.quantile = 0.2" in told
    assert "│ quantile = 0.2 │" in told  # whole, in a terminal of 80 columns
    assert "…" not in told
    (usual, *_) = CalibrationStatistics.load(Path(model)).segments
    assert len(usual.markers) == 64  # 8 prompts × 8 siblings
    ((answer,),) = decode(model, "pb;jp;nt;ph;pn;ht;j>t:")
    first = answer.trajectory.segments[0].judgement.threshold
    assert first.baseline == pytest.approx(float(np.quantile(usual.markers, 0.2)))


def test_calibration_gathers_the_statistics_that_a_reference_baseline_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    model = str(shutil.copytree(lab_directory(), tmp_path / "model"))
    calibrate = ["calibrate", model, "lab:chain", "--prompts", "4", "erasure.baseline=reference", "erasure.eta=0.07"]
    assert main(calibrate) == 0
    assert "Recommended: erasure.kappa0" in capsys.readouterr().out
    [[answer]] = decode(model, LAB_PROBLEM)
    first = answer.trajectory.segments[0].judgement
    usual = CalibrationStatistics.load(tmp_path / "model").at(0).moments
    config = find_companions(model).config().erasure
    assert config.baseline == "reference"
    assert first.threshold.baseline == pytest.approx(usual.mean + config.kappa0 * usual.std)


def test_calibration_samples_all_of_the_data_and_finds_a_static_baseline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Of a mix of families the first problems are all of one; what is saved can be laid on a recipe that knows no height."""
    mix = ["lab:chain:3+lab:path:3", "--recipe", "lab", "--prompts", "8"]
    assert main(["calibrate", "lab", *mix, "--output", str(tmp_path / "mix")]) == 0
    height = load_config(tmp_path / "mix" / "e3rl_recipe.toml").erasure.static_baseline
    told = " ".join(capsys.readouterr().out.split())
    assert f"One threshold for all groups: static_baseline = {height:.3g}." in told
    assert main(["calibrate", "lab", "lab:path:3", *mix[1:], "--output", str(tmp_path / "path")]) == 0
    assert main(["calibrate", "lab", "lab:chain:3", *mix[1:], "--output", str(tmp_path / "chain")]) == 0
    chain, path = (load_config(tmp_path / n / "e3rl_recipe.toml").erasure.static_baseline for n in ("chain", "path"))
    assert chain < height < path
    capsys.readouterr()
    unknown = ["train", "lab", "--overlay", "ablations/without-group", f"run.output_dir={tmp_path}", "train.steps=1"]
    unknown += ["train.prompts_per_step=2", "eval.limit=1", "erasure.static_baseline=0.0"]
    assert "needs erasure.static_baseline, and it is 0: 'e3rl calibrate'" in _fails(capsys, unknown)


def test_an_uncertainty_without_terms_can_not_be_calibrated(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    weights = [f"erasure.{term}_weight=0" for term in ("base", "gradient", "extremum", "perturbation")]
    assert "has no term to calibrate" in _fails(
        capsys, ["calibrate", "lab", "lab:chain", "--output", str(tmp_path), *weights]
    )


def test_calibrate_saves_what_single_sample_decoding_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Without a recipe, by the settings that lie beside the model."""
    assert main(["calibrate", "lab", "lab:chain", "--prompts", "4", "--output", str(tmp_path)]) == 0
    assert "segment_length = 12" in (tmp_path / "e3rl_recipe.toml").read_text(encoding="utf-8")
    assert {p.name for p in tmp_path.iterdir()} == {"e3rl_reference.json", "e3rl_recipe.toml"}
    assert "Recommended: erasure.kappa0" in capsys.readouterr().out


def test_names_that_other_libraries_will_change_are_not_the_users_concern(tmp_path: Path):
    run = [*TINY_RUN, f"run.output_dir={tmp_path}", "train.gradient_checkpointing=true", "model.lora_r=2"]
    command = [sys.executable, "-m", "e3rl", "train", _recipe(tmp_path), *run]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


def test_calibrate_knows_where_to_save_before_it_begins(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "say where to save with --output DIR" in _fails(capsys, ["calibrate", "nobody/nothing", "lab:chain"])
    assert "'lab' is part of e3rl, and its own settings stay" in _fails(capsys, ["calibrate", "lab", "lab:chain"])
    taken = _recipe(tmp_path)
    assert "is a file" in _fails(capsys, ["calibrate", "lab", "lab:chain", "--output", taken])


def test_the_command_line_answers_at_once_and_without_torch():
    code = "import sys\nfrom e3rl.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'uvicorn', 'starlette'} & set(sys.modules) or False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["e3rl", "0.1.0", "False"]


def test_the_problem_that_decode_shows_is_held_out():
    assert LAB_PROBLEM in {p.prompt for p in generate("chain", 3, "heldout", 256)}
    assert half("chain", LAB_PROBLEM) == "heldout"
