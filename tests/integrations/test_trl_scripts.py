"""Scripts as people write them: every setting is found behind its name, or said to be lost."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from e3rl.cli import main
from e3rl.config import build_config, load_config
from e3rl.errors import UserError
from e3rl.integrations.script_source import UNKNOWN, Source
from e3rl.integrations.trl_arguments import Arguments, read_arguments
from e3rl.integrations.trl_recipe import SET_DATA, Translation, translate
from e3rl.integrations.trl_scripts import read_script
from tests.integrations.fixtures import SCRIPTS


def converted(name: str) -> Translation:
    return translate(read_arguments([str(SCRIPTS / f"{name}.py")]))


def read(text: str) -> Arguments:
    return read_script(text, Path("x.py"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "quickstart",
            {
                "model": {"path": "./model", "dtype": "bfloat16"},
                "data": {"train": "chat.jsonl", "raw_prompts": True},
                "rewards": {"functions": ["rewards_of_mine:right"]},
            },
        ),
        (
            "positional",
            {
                "model": {
                    "path": "./model", "dtype": "bfloat16", "lora_r": 16, "lora_alpha": 8, "lora_dropout": 0.0,
                    "lora_target_modules": ["q_proj", "o_proj"],
                },
                "data": {"train": "plain.jsonl", "train_split": "train", "raw_prompts": True},
                "rewards": {"functions": ["rewards_of_mine:right", "rewards_of_mine:short"], "weights": [1.0, 0.5]},
            },
        ),
        (
            "main_function",
            {
                "run": {"output_dir": "./model-grpo", "seed": 42},
                "model": {"path": "./model", "dtype": "float32"},
                "data": {
                    "train": "questions.jsonl", "prompt_column": "question", "train_limit": 4, "raw_prompts": True,
                },
            },
        ),
        (
            "mapped",
            {
                "model": {
                    "path": "./model", "dtype": "bfloat16", "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0,
                    "lora_target_modules": ["all-linear"],
                },
            },
        ),
        ("gspo", {"data": {"train": "chat.jsonl", "eval": ["heldout.jsonl"], "raw_prompts": True}}),
    ],
)  # fmt: skip
def test_every_setting_of_a_script_is_found(name: str, expected: dict[str, Any]):
    tables = converted(name).tables
    found = {section: dict(tables[section]) for section in expected}
    for table in found.values():
        table.pop("train_split" if name != "positional" else "-", None)
        table.pop("eval_split", None)
    assert found == expected


@pytest.mark.parametrize(
    ("growing", "last"),
    [
        ("\n".join(f"a{i + 1} = a{i} + a{i}" for i in range(50)), "a50"),
        ("\n".join(f"a{i + 1} = a{i} + 1" for i in range(3000)), "a3000"),
        ("a0 += 1\n" * 3000, "a0"),
    ],
    ids=["doubled 50 times", "3,000 names", "3,000 additions"],
)
def test_what_grows_without_end_is_not_calculated(growing: str, last: str):
    found = read(f"a0 = 1\n{growing}\nGRPOTrainer('m', args=GRPOConfig(max_steps={last}, seed=7))")
    assert found.values["seed"] == 7
    assert "max_steps" not in found.values
    assert any("max_steps" in remark for remark in found.remarks)


def test_numbers_of_a_script_are_computed_and_followed():
    positional, gspo, main_function = (converted(n).tables for n in ("positional", "gspo", "main_function"))
    assert positional["train"]["learning_rate"] == 2e-5
    assert (positional["train"]["prompts_per_step"], positional["rollout"]["top_k"]) == (4, 5)
    assert (gspo["train"]["prompts_per_step"], gspo["train"]["minibatches"], gspo["train"]["num_iterations"]) == (
        4,
        4,
        2,
    )
    assert gspo["objective"] == {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0}
    assert gspo["run"]["seed"] == 7
    assert (main_function["train"]["learning_rate"], main_function["train"]["weight_decay"]) == (5e-6, 0.1)
    assert (main_function["objective"]["clip_high"], main_function["objective"]["kl_ratio"]) == (0.28, True)
    assert main_function["rollout"]["num_generations"] == 2


def test_what_a_script_loses_is_exactly_what_its_code_does():
    losses = {
        name: converted(name).losses for name in ("quickstart", "positional", "main_function", "mapped", "gspo", "rloo")
    }
    assert losses["quickstart"] == losses["positional"] == losses["gspo"] == losses["rloo"] == ()
    assert [loss.partition(":")[0] for loss in losses["main_function"]] == ["the first 4 of shuffled rows"]
    assert [loss.partition(":")[0] for loss in losses["mapped"]] == ["dataset.map and dataset.filter"]


@pytest.mark.parametrize(
    "model",
    [
        "os.environ['MODEL']",
        "args.model_name_or_path",
        "build()",
        "AutoModelForCausalLM.from_config(config)",
        "NAMES[0]",
    ],
)
def test_a_model_that_can_not_be_read_is_an_error_and_a_name_mends_it(model: str, tmp_path: Path, capsys: Any):
    path, recipe = tmp_path / "train.py", tmp_path / "recipe.toml"
    path.write_text(f"trainer = GRPOTrainer({model}, 'accuracy_reward', train_dataset=load_dataset('a/b'))\n")
    assert main(["convert", "trl", str(path)]) == 2
    error = capsys.readouterr().err
    assert "name no model that can be read: name it with --model MODEL (model: line 1" in error
    assert main(["convert", "trl", str(path), "--model", "me/mine", "--output", str(recipe)]) == 0
    assert load_config(recipe).model.path == "me/mine"


def test_data_that_can_not_be_read_are_refused_by_training_and_are_never_the_lab_s():
    translation = translate(read("GRPOTrainer('m', 'accuracy_reward', train_dataset=Dataset.from_list(rows))"))
    assert build_config(translation.tables).data.train == SET_DATA
    assert any(loss.startswith("train_dataset: none is named") for loss in translation.losses)


@pytest.mark.parametrize(
    "text",
    [
        "name = 'a'\nif big:\n    name = 'b'\nGRPOTrainer(name)",
        "name = 'a'\nif 'a' in 3:\n    name = 'b'\nGRPOTrainer(name)",
        "for name in names:\n    GRPOTrainer(name)",
        "name, other = pick()\nGRPOTrainer(name)",
        "def f(name):\n    GRPOTrainer(name)",
        "GRPOTrainer(name)\nname = 'a'",
        "name = 'a'\nfor name in names:\n    pass\nGRPOTrainer(name)",
        "name = 'a'\nname *= 2\nGRPOTrainer(name)",
        "def main():\n    GRPOTrainer(name)\nname = 'a'\nmain()\nname = 'b'",
        "def f(name='a'):\n    GRPOTrainer(name)\nf(pick())",
        "def f(name='a'):\n    GRPOTrainer(name)\nf()\nf('b')",
        "def pick():\n    if big:\n        return 'b'\n    return 'a'\nGRPOTrainer(pick())",
    ],
)
def test_a_name_that_may_be_several_things_is_not_guessed(text: str):
    found = read(text)
    assert "model_name_or_path" not in found.values
    assert any(remark.startswith("model: line") for remark in found.remarks)


def test_the_last_binding_before_the_use_counts():
    found = read("name = 'a'\nname = 'b'\nGRPOTrainer(name)\nname = 'c'")
    assert found.values["model_name_or_path"] == "b"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 / 4", 0.25), ("2**3 * 2 - 1 + 8 // 3", 17), ("'a' + 'b'", "ab"), ("f'{N}-x'", "4-x"), ("[N, 1]", [4, 1]),
        ("torch.bfloat16", "bfloat16"), ("-1e-6", -1e-6), ("{'a': 1}", {"a": 1}), ("9**9**9", UNKNOWN), ("1/0", UNKNOWN),
        ("len(x)", UNKNOWN), ("f'{x}'", UNKNOWN), ("'a' * 10**9", UNKNOWN),
    ],
)  # fmt: skip
def test_constants_are_computed_and_nothing_else_is(expression: str, value: Any):
    source = Source(ast.parse(f"N = 4\ny = {expression}"))
    last = ast.parse(f"\n\n{expression}", mode="eval").body
    assert source.value(last) is value if value is UNKNOWN else source.value(last) == value


def test_adapters_made_by_hand_and_their_other_options():
    found = read(
        "m = get_peft_model(AutoModelForCausalLM.from_pretrained('x', device_map='auto', load_in_4bit=True), "
        "LoraConfig(r=4, use_rslora=True, bias='none'))\nGRPOTrainer(m)"
    )
    assert found.values == {
        "model_name_or_path": "x", "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
        "lora_target_modules": [],
    }  # fmt: skip
    assert sorted(remark.partition(":")[0] for remark in found.remarks) == [
        "load_in_4bit of from_pretrained", "use_rslora = True",
    ]  # fmt: skip


def test_a_quantised_model_under_adapters_carries_over():
    """BitsAndBytesConfig's own 4-bit numbers are fp4, TRL's command line takes nf4."""
    lora = "from_pretrained('x', quantization_config=q), LoraConfig(r=4))"
    for given, kind, losses in (
        ("load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16", "nf4", []),
        ("load_in_4bit=True", "nf4", ["bnb_4bit_quant_type = 'fp4'"]),
        ("load_in_8bit=True", "int8", []),
    ):
        text = f"q = BitsAndBytesConfig({given})\nm = get_peft_model(AutoModelForCausalLM.{lora}\n"
        for script in (
            f"{text}GRPOTrainer(m, right, train_dataset=load_dataset('a/b'))",
            f"q = BitsAndBytesConfig({given})\nGRPOTrainer('x', right, train_dataset=load_dataset('a/b'), "
            "peft_config=LoraConfig(r=4), quantization_config=q)",
        ):
            found = translate(read(f"from mine import right\n{script}"))
            assert found.tables["model"]["quantization"] == kind
            assert [loss.partition(":")[0] for loss in found.losses] == losses
    unknown = read("GRPOTrainer('x', quantization_config=pick())")
    assert any("set model.quantization by hand" in remark for remark in unknown.remarks)


def test_settings_may_come_after_the_script_as_on_a_command_line(tmp_path: Path):
    path = tmp_path / "parsed.py"
    path.write_text(
        "script, args, model = TrlParser((A, GRPOConfig, ModelConfig)).parse_args_and_config()\n"
        "GRPOTrainer(model=model.model_name_or_path, args=args, reward_funcs='accuracy_reward', "
        "train_dataset=load_dataset('a/b'), callbacks=[Mine()], tools=None)\n"
    )
    found = translate(read_arguments([str(path), "--model_name_or_path", "m", "--learning_rate", "3e-6"]))
    assert (found.tables["model"]["path"], found.tables["train"]["learning_rate"]) == ("m", 3e-6)
    assert [loss.partition(":")[0] for loss in found.losses] == ["callbacks = [Mine()]"]
    with pytest.raises(UserError, match="the script takes it from its command line: --model_name_or_path after '--'"):
        translate(read_arguments([str(path)]))
    by_hand = translate(read_arguments([str(path)]).updated(Arguments({"model_name_or_path": "m"})))
    assert [loss.partition(":")[0] for loss in by_hand.losses] == ["args = args", "callbacks = [Mine()]"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "no call of GRPOTrainer"),
        ("GRPOTrainer('a')\nGRPOTrainer('b')", "2 calls of GRPOTrainer"),
        ("a(" * 200 + ")" * 200, "not valid Python|no call of"),
    ],
)
def test_scripts_with_nothing_to_convert_are_said(text: str, words: str):
    with pytest.raises(UserError, match=words):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "name = 'a'\ndef judge():\n    name = 'b'\nGRPOTrainer(name)",
        "name = 'a'\nclass C:\n    name = 'b'\nGRPOTrainer(name)",
        "kind = 1\nif kind == 2:\n    name = 'b'\nelse:\n    name = 'a'\nGRPOTrainer(name)",
        "kind = False\nname = 'a'\nif kind:\n    name = 'b'\nGRPOTrainer(name)",
        "full = 'x/Llama'\nif 'Qwen' in full:\n    name = 'b'\nelse:\n    name = 'a'\nGRPOTrainer(name)",
        "full = 'x/Llama'\nname = 'a'\nif full not in ['x/Llama']:\n    name = 'b'\nGRPOTrainer(name)",
        "name = ''\nname += 'a'\nGRPOTrainer(name)",
        "def pick():\n    name = 'a'\n    return name\nGRPOTrainer(pick())",
        "def pick(name='a'):\n    return name\nGRPOTrainer(pick())",
        "def pick(name='b'):\n    return name\nGRPOTrainer(pick('a'))",
        "name = 'a'\ndef main():\n    GRPOTrainer(name)\nmain()",
        "name, dataset = 'a', 'c'\nGRPOTrainer(name)",
    ],
)
def test_a_name_means_what_it_would_mean_when_the_script_runs(text: str):
    found = read(text)
    assert found.values["model_name_or_path"] == "a"
    assert found.remarks == ()


def test_settings_that_are_changed_in_place_or_under_a_condition_are_said():
    found = read(
        "c = {'learning_rate': 1e-6}\nc['learning_rate'] = 2e-6\nrewards = ['accuracy_reward']\nrewards.append(mine)\n"
        "args = GRPOConfig(seed=1, max_steps=5, **c)\nif fast:\n    args.max_steps = 2\nargs.seed = 3\n"
        "GRPOTrainer('m', rewards, args)"
    )
    assert found.values == {"model_name_or_path": "m", "seed": 3, "reward_funcs": []}
    assert [remark.partition(":")[0] for remark in found.remarks] == ["**c", "max_steps", "reward_funcs"]


COPIED = """
SYSTEM = "Think."
def questions(split="train") -> Dataset:
    data = load_dataset('openai/gsm8k', 'main')[split]
    data = data.map(lambda x: {'prompt': [{'role': 'system', 'content': SYSTEM}]})
    return data
dataset = questions()
def right(completions, answer, **kwargs):
    rewards = []
    for completion in completions:
        rewards.append(1.0)
    return rewards
model = "Qwen"
if model == "Llama":
    model_name, output_dir = "meta-llama/Llama-3.2-1B-Instruct", "outputs/Llama"
else:
    model_name, output_dir = "Qwen/Qwen2.5-1.5B-Instruct", "outputs/Qwen"
args = GRPOConfig(output_dir=output_dir, bf16=True, model_init_kwargs={"torch_dtype": torch.bfloat16, "device_map": None})
model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.bfloat16, device_map=None).to("cuda")
tokenizer = AutoTokenizer.from_pretrained(model_name)
trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[right], args=args, train_dataset=dataset)
if __name__ == "__main__":
    trainer.train()
"""


def test_a_script_of_the_kind_that_is_passed_around_is_read(tmp_path: Path):
    path = tmp_path / "demo.py"
    path.write_text(COPIED)
    found = translate(read_arguments([str(path)]))
    assert found.tables["model"] == {"path": "Qwen/Qwen2.5-1.5B-Instruct", "dtype": "bfloat16"}
    assert found.tables["run"]["output_dir"] == "outputs/Qwen"
    assert found.tables["data"] == {"train": "openai/gsm8k:main", "train_split": "train", "raw_prompts": True}
    assert [loss.partition(":")[0] for loss in found.losses] == ["dataset.map and dataset.filter"]


PARSED = """
script_args, training_args, model_args = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
training_args.model_init_kwargs = dict(revision=model_args.model_revision)
train, held_out = load_dataset("AI-MO/NuminaMath-TIR", split=["train[:5%]", "test[:5%]"])
train, held_out = train.remove_columns("messages"), held_out.remove_columns("messages")
named = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
trainer = GRPOTrainer(
    model=model_args.model_name_or_path, args=training_args, reward_funcs="think_format_reward",
    train_dataset=TRAIN, eval_dataset=EVAL, peft_config=get_peft_config(model_args),
)
"""
GIVEN = ["--model_name_or_path", "m", "--use_peft", "--torch_dtype", "float32", "--dataset_name", "a/b"]


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        (
            "train", "held_out",
            {"train": "AI-MO/NuminaMath-TIR", "train_split": "train[:5%]", "eval": ["AI-MO/NuminaMath-TIR"],
             "eval_split": "test[:5%]", "raw_prompts": True},
        ),
        (
            "named[script_args.dataset_train_split]",
            "named[script_args.dataset_test_split] if training_args.eval_strategy != 'no' else None",
            {"train": "a/b", "raw_prompts": True},
        ),
    ],
)  # fmt: skip
def test_what_a_script_parses_from_its_command_line_comes_after_it(
    train: str, held_out: str, expected: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "gspo.py"
    path.write_text(PARSED.replace("TRAIN", train).replace("EVAL", held_out))
    given = GIVEN if train.startswith("named") else GIVEN[:-2]
    found = translate(read_arguments([str(path), *given]))
    assert found.tables["data"] == expected
    assert (found.tables["model"]["dtype"], found.tables["model"]["lora_r"]) == ("float32", 16)
    assert [loss.partition(":")[0] for loss in found.losses] == ["model_init_kwargs"]


@pytest.mark.parametrize("around", ["if __name__ == '__main__':", "def main():"])
def test_a_reward_function_that_an_import_does_not_define_is_said(around: str):
    found = read(f"{around}\n    def right(completions):\n        return [1.0]\n    GRPOTrainer('m', right)")
    assert found.values["reward_funcs"] == ["x.py:right"]
    assert found.remarks[0].startswith("reward function right: line 4: an import of the script does not define it")


def test_a_reward_model_is_carried_over_in_its_place():
    text = (
        "judge = AutoModelForSequenceClassification.from_pretrained('me/judge', num_labels=1)\n"
        "from mine import right\nGRPOTrainer('m', [right, JUDGE], GRPOConfig(reward_weights=[1.0, 0.5]))"
    )
    for spelled in ("'me/judge'", "judge"):
        found = translate(read(text.replace("JUDGE", spelled))).tables["rewards"]
        assert found["functions"] == ["mine:right", "reward_model"]
        assert (found["reward_model"], found["weights"]) == ({"path": "me/judge"}, [1.0, 0.5])
    given = [
        "--model_name_or_path",
        "m",
        "--reward_model_name_or_path",
        "judge",
        "--reward_funcs",
        "accuracy_reward",
        "me/b",
    ]
    both = translate(read_arguments(given))
    assert both.tables["rewards"] == {
        "functions": ["reward_model", "trl.rewards:accuracy_reward"],
        "reward_model": {"path": "./judge"},
    }
    assert "reward model me/b: a run has one, ./judge" in both.losses
