"""TRL's settings become the same run here, and nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e3rl.cli import main
from e3rl.config import Config, load_config
from e3rl.errors import UserError
from e3rl.integrations.trl_arguments import read_arguments, read_command_line
from e3rl.integrations.trl_recipe import Translation, translate
from e3rl.integrations.trl_schedule import Batches, batches
from e3rl.objectives import build

SCRIPT = """
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from my_rewards import accuracy

LEARNING_RATE = 2e-6

def brevity(completions, **kwargs):
    return [-len(c) for c in completions]

dataset = load_dataset("openai/gsm8k", "main", split="train")
args = GRPOConfig(
    output_dir="out", learning_rate=LEARNING_RATE, num_generations=4, per_device_train_batch_size=16,
    gradient_accumulation_steps=2, loss_type="grpo", beta=0.04, epsilon=0.1, reward_weights=[1.0, 0.5],
    max_steps=len(dataset) // 3, logging_steps=1, bf16=False,
)
trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B", reward_funcs=[accuracy, brevity], args=args, train_dataset=dataset,
    peft_config=LoraConfig(r=8, lora_alpha=16),
)
trainer.train()
raise SystemExit("this script must never run")
"""


def convert(tmp_path: Path, source: str, **options: Any) -> tuple[Config, Translation]:
    """The config that the converted recipe loads as."""
    translation = translate(read_command_line(f"{source} --model_name_or_path m".split()), **options)
    path = tmp_path / "recipe.toml"
    path.write_text(translation.to_toml(), encoding="utf-8")
    return load_config(path), translation


def lost(translation: Translation, name: str) -> list[str]:
    return [loss for loss in translation.losses if loss.startswith(name)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # 8 completions at once, one update a rollout of one group of 8
        ({"per_device": 8, "processes": 1, "accumulation": 1, "generations": 8}, Batches(1, 1)),
        # 16 on 4 processes, twice: 128 completions are 16 groups of 8 and one update
        ({"per_device": 16, "processes": 4, "accumulation": 2, "generations": 8}, Batches(16, 1)),
        # 128 completions rolled out at once, 32 an update: 16 groups, 4 updates
        (
            {"per_device": 16, "processes": 1, "accumulation": 2, "generations": 8, "generation_batch_size": 128},
            Batches(16, 4),
        ),
        ({"per_device": 8, "processes": 2, "accumulation": 1, "generations": 4, "steps_per_generation": 6}, Batches(24, 6)),
        # an update gathers the gradients of two rollouts: one step of both
        ({"per_device": 8, "processes": 1, "accumulation": 2, "generations": 8, "steps_per_generation": 1}, Batches(2, 1)),
    ],
)  # fmt: skip
def test_batch_sizes_are_counted_in_groups(sizes: dict[str, int], expected: Batches):
    assert batches(**sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"generations": 3}, "no whole groups.*here 1, say on how many: --processes N"),
        ({"generation_batch_size": 12}, "no multiple of the 8"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "takes one of them"),
        ({"accumulation": 2, "steps_per_generation": 3}, "neither divides the other"),
    ],
)
def test_batch_sizes_that_trl_refuses_are_refused(sizes: dict[str, int], words: str):
    with pytest.raises(UserError, match=words):
        batches(**{"per_device": 8, "processes": 1, "accumulation": 1, "generations": 4, **sizes})


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ("", "dapo", {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}),
        ("--epsilon_high 0.28", "dapo", {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0}),
        (
            "--loss_type grpo --beta 0.04 --epsilon 0.1",
            "grpo",
            {"average": "sequence", "clip_low": 0.1, "clip_high": 0.1, "kl_coef": 0.04, "kl_ratio": True},
        ),
        (
            "--beta 0.04 --use_bias_correction_kl false --delta 4 --scale_rewards false",
            "dapo",
            {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.04, "ratio_cap": 4.0, "scale_rewards": "none"},
        ),
        ("--loss_type bnpo", "grpo", {"average": "token", "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}),
        ("--loss_type dr_grpo", "dr_grpo", {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}),
        (
            "--loss_type grpo --importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4",
            "gspo",
            {"clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
        ),
        (
            "--loss_type sapo --sapo_temperature_neg 1.2",
            "sapo",
            {"temperature_positive": 1.0, "temperature_negative": 1.2, "kl_coef": 0.0},
        ),
        ("--loss_type cispo --epsilon_high 5", "cispo", {"ratio_cap": 5.0, "kl_coef": 0.0}),
        (
            "--loss_type luspo --importance_sampling_level sequence --epsilon 3e-4 --beta 0.1",
            "luspo",
            {"clip_low": 3e-4, "clip_high": 3e-4, "kl_coef": 0.1},
        ),
        (
            "--loss_type vespo --vespo_k_pos 1.0 --vespo_lambda_neg 4.0",
            "vespo",
            {"k_positive": 1.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 4.0, "kl_coef": 0.0},
        ),
        ("--loss_type new", "dapo", {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0}),
    ],
)
def test_a_loss_becomes_its_objective(tmp_path: Path, given: str, name: str, options: dict[str, Any]):
    config, _ = convert(tmp_path, given)
    assert (config.objective.name, config.objective.options) == (name, options)
    build(config.objective)  # the objective accepts all of them


def test_rloo_has_its_own_defaults(tmp_path: Path):
    """The command says that it is RLOO, or the script's trainer, or a file's settings that only RLOO has."""
    words = "trl rloo --model_name_or_path m --reward_funcs a.b --learning_rate 3e-6 --epsilon_high 0.3 --use_vllm"
    translation = translate(
        read_command_line([*words.split(), "--normalize_advantages", "--reward_clip_range", "[-1, 1]"])
    )
    tables = translation.tables
    assert tables["objective"] == {"name": "rloo", "clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.05}
    assert tables["rollout"]["num_generations"] == 2
    assert tables["train"]["prompts_per_step"] == 4
    assert "importance_correction" not in tables["train"]
    assert lost(translation, "normalize_advantages")
    assert lost(translation, "reward_clip_range")
    assert translation.to_toml().startswith("# Translated from TRL's RLOO.")
    script, settings = tmp_path / "a.py", tmp_path / "a.yaml"
    script.write_text("from trl import RLOOConfig, RLOOTrainer\nRLOOTrainer('m', f, RLOOConfig(beta=0.1))")
    assert translate(read_arguments([str(script)])).tables["objective"]["kl_coef"] == 0.1
    settings.write_text("model_name_or_path: m\nnormalize_advantages: true\n")
    assert translate(read_arguments([str(settings)])).tables["objective"]["name"] == "rloo"
    settings.write_text("model_name_or_path: m\n")
    assert translate(read_arguments([str(settings)])).tables["objective"]["name"] == "dapo"
    assert translate(read_arguments([str(settings), "trl", "rloo"])).tables["objective"]["name"] == "rloo"
    script.write_text("GRPOTrainer('m')\nRLOOTrainer('m')")
    with pytest.raises(UserError, match=r"2 calls of GRPOTrainer\(...\) and RLOOTrainer"):
        read_arguments([str(script)])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("--loss_type new", "loss_type = 'new': there is no such objective"),
        ("--loss_type luspo", "importance_sampling_level = 'token'"),
        ("--loss_type vespo --use_vllm", "loss_type = 'vespo' with use_vllm"),
        ("--loss_type bnpo", "loss_type = 'bnpo'"),
        ("--loss_type dapo --importance_sampling_level sequence", "loss_type = 'dapo' with sequence ratios"),
        ("--loss_type sapo --importance_sampling_level sequence", "importance_sampling_level"),
        ("--loss_type sapo --beta 0.1", "use_bias_correction_kl"),
        ("--loss_type sapo --scale_rewards none", "scale_rewards = 'none'"),
        ("--scale_rewards batch", "scale_rewards = 'batch'"),
        ("--loss_type dr_grpo", "scale_rewards = 'group'"),
        ("--optim adafactor", "optim = 'adafactor'"),
        ("--min_p 0.1", "min_p = 0.1: sampling has"),
        ("--loss_type cispo --delta 4.0", "delta = 4.0"),
        ("--use_vllm", "use_vllm = True"),
        ("--vllm_server_port 9000", "vllm_server_port = 9000"),
        ("--max_grad_norm 0.0", "max_grad_norm = 0"),
        ("--lr_scheduler_type polynomial", "lr_scheduler_type = 'polynomial'"),
        ("--report_to comet_ml", "report_to = ['comet_ml']"),
        ("--save_strategy epoch", "save_steps"),
        ("--fp16", "fp16"),
        ("--reward_weights 1.0 2.0", "reward_weights"),
        ("--never_heard_of 1", "never_heard_of = 1: this is no setting of TRL"),
        ("--steps_per_generation 4 --per_device_train_batch_size 2", "4 updates over 1 groups"),
    ],
)
def test_what_does_not_carry_over_is_named(tmp_path: Path, given: str, name: str):
    _, translation = convert(tmp_path, given)
    assert len(lost(translation, name)) == 1, translation.losses


@pytest.mark.parametrize(
    "given",
    [
        "--min_p 0.0", "--repetition_penalty 1.0", "--scale_rewards true", "--loss_type dr_grpo --scale_rewards none",
        "--beta 0.1 --use_bias_correction_kl false", "--optim adamw_torch", "--no_push_to_hub", "--warmup_ratio 0.1",
        "--warmup_steps 10", "--report_to mlflow", "--report_to none", "--deepspeed null",
    ],
)  # fmt: skip
def test_settings_that_ask_for_nothing_are_no_loss(tmp_path: Path, given: str):
    _, translation = convert(tmp_path, given)
    basic = ("model: ", "train_dataset: ", "reward_funcs: ")
    assert [loss for loss in translation.losses if not loss.startswith(basic)] == []


def test_quantised_weights_under_adapters_and_the_routers_loss_carry_over(tmp_path: Path):
    config, translation = convert(tmp_path, "--use_peft --load_in_4bit --router_aux_loss_coef 0.01")
    assert (config.model.quantization, config.train.router_loss) == ("nf4", 0.01)
    assert not lost(translation, "load_in")
    config, translation = convert(tmp_path, "--use_peft --load_in_8bit --use_bnb_nested_quant")
    assert config.model.quantization == "int8"
    assert not lost(translation, "use_bnb_nested_quant")
    config, translation = convert(tmp_path, "--load_in_4bit")
    assert config.model.quantization == "none"
    assert lost(translation, "load_in_4bit, load_in_8bit: weights are trained whole here unless model.lora_r is set")
    named = {
        "--bnb_4bit_quant_type fp4": "bnb_4bit_quant_type = 'fp4'",
        "--use_bnb_nested_quant": "use_bnb_nested_quant",
    }
    for given, name in named.items():
        config, translation = convert(tmp_path, f"--use_peft --load_in_4bit {given}")
        assert config.model.quantization == "nf4"
        assert lost(translation, name)


def test_optimizers_and_masking_carry_over(tmp_path: Path):
    config, translation = convert(tmp_path, "--optim adamw_bnb_8bit --mask_truncated_completions")
    assert (config.train.optimizer, config.train.mask_truncated_completions) == ("adamw_8bit", True)
    assert convert(tmp_path, "--optim adamw_torch_fused")[0].train.optimizer == "adamw_fused"
    assert not lost(translation, "optim") + lost(translation, "mask")
    assert convert(tmp_path, "")[0].train.optimizer == "adamw"


def test_trl_defaults_are_written_out(tmp_path: Path):
    """Where TRL's default differs from the recipe's, the translated run has TRL's."""
    config, _ = convert(tmp_path, "")
    assert config.run.seed == 42
    assert (config.train.epochs, config.train.steps) == (3.0, 0)
    assert (config.train.prompts_per_step, config.train.minibatches, config.train.learning_rate) == (1, 1, 1e-6)
    assert (config.train.lr_scheduler_type, config.train.warmup_ratio) == ("linear", 0.0)
    assert config.train.gradient_checkpointing is True
    assert (config.train.eval_steps, config.train.save_steps, config.train.save_total_limit) == (0, 500, 0)
    assert config.model.dtype == "bfloat16"
    assert (config.rollout.erase, config.rollout.num_generations, config.rollout.completion_limit) == (False, 8, 512)
    assert config.rollout.segment_length == 64


def test_counts_of_updates_become_counts_of_steps(tmp_path: Path):
    given = (
        "--per_device_train_batch_size 8 --num_generations 8 --generation_batch_size 64 --num_iterations 2 "
        "--max_steps 100 --eval_strategy steps --eval_steps 20 --save_steps 50 --warmup_steps 10"
    )
    config, _ = convert(tmp_path, given, processes=2)
    # 64 completions are 8 groups; updates of 16: 4 a pass, 8 a step
    assert (config.train.prompts_per_step, config.train.minibatches, config.train.num_iterations) == (8, 4, 2)
    assert (config.train.steps, config.train.eval_steps, config.train.save_steps) == (13, 3, 7)
    assert config.train.warmup_steps == 10


def test_a_yaml_file_is_read_as_trl_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """YAML takes 1e-6 for text, and TRL makes a number of it; arguments override the file."""
    source, recipe = tmp_path / "grpo.yaml", tmp_path / "out.toml"
    source.write_text(
        "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: trl-lib/DeepMath-103K\nlearning_rate: 1e-5\n"
        "num_generations: 4\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nuse_peft: true\nlora_r: 8\n"
        "reward_funcs:\n  - accuracy_reward\n  - get_soft_overlong_punishment\n  - my.rewards.brevity\n"
        "reward_weights: [1.0, 0.5, 0.1]\nlog_completions: true\ntemperature: 0.9\ntop_k: 50\n"
    )
    given = ["convert", "trl", "--output", str(recipe), str(source), "--", "--learning_rate", "2e-6", "--top_p=0.9"]
    assert main(given) == 0
    config = load_config(recipe)
    assert config.model.path == "Qwen/Qwen3-0.6B"
    assert (config.model.lora_r, config.model.lora_alpha, config.model.lora_dropout) == (8, 32, 0.05)
    assert config.data.train == "trl-lib/DeepMath-103K"
    assert config.rewards.functions == ("trl.rewards:accuracy_reward", "overlong", "my.rewards:brevity")
    assert config.rewards.weights == (1.0, 0.5, 0.1)
    assert (config.train.learning_rate, config.train.lr_scheduler_type, config.train.warmup_ratio) == (
        2e-6,
        "cosine",
        0.1,
    )
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (0.9, 0.9, 50)
    assert "not carried over: log_completions = True" in capsys.readouterr().err
    assert "# - log_completions = True" in recipe.read_text()


def test_a_script_is_read_and_never_run(tmp_path: Path):
    path = tmp_path / "train_grpo.py"
    path.write_text(SCRIPT)
    translation = translate(read_arguments([str(path)]))
    tables = translation.tables
    assert tables["model"] == {
        "path": "Qwen/Qwen3-0.6B", "dtype": "float32", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "lora_target_modules": [],
    }  # fmt: skip
    assert tables["data"] == {"train": "openai/gsm8k:main", "train_split": "train", "raw_prompts": True}
    assert tables["rewards"] == {"functions": ["my_rewards:accuracy", f"{path}:brevity"], "weights": [1.0, 0.5]}
    assert tables["train"]["learning_rate"] == 2e-6
    assert tables["train"]["prompts_per_step"] == 8
    assert "steps" not in tables["train"]
    assert lost(translation, "max_steps: line") == [
        "max_steps: line 16: scripts are not run, and only running it would tell; set it by hand"
    ]
    assert "would run the training" in lost(translation, "reward function brevity")[0]


@pytest.mark.parametrize(
    "source",
    [
        ["--learning_rate 3e-6 --num_generations 4"],
        ["--learning-rate", "3e-6", "--num-generations=4"],
        ["trl grpo --learning_rate 3e-6 --num_generations 4"],
    ],
)
def test_command_lines_in_every_writing(source: list[str]):
    assert read_arguments(source).values == {"learning_rate": 3e-6, "num_generations": 4}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "", "expected a .yaml, .json or .py"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "- 1", "settings by name"),
        ("a.py", "def", "not valid Python"),
        ("a.py", "x = 1", "no call of GRPOTrainer(...), RLOOTrainer(...) or their configs"),
        ("a.yaml", "num_generations: 4", "name no model that can be read: name it with --model"),
        ("a.yaml", "num_generations: many", "num_generations = 'many': expected int"),
        ("a.yaml", "model_name_or_path: m\ntemperature: 0", "rollout.temperature"),
    ],
)
def test_what_can_not_be_read_is_said_in_a_sentence(
    tmp_path: Path, name: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / name
    path.write_text(text)
    assert main(["convert", "trl", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
