"""`e3rl init` and `e3rl data`: columns by what they hold, lengths by the tokenizer, a recipe that trains as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e3rl.cli import main
from e3rl.config import DataConfig, ModelConfig, load_config
from e3rl.data.loading import load_problems
from e3rl.data.starter import (
    Lengths,
    find_columns,
    held_out_beside,
    look_at,
    measure,
    percentile,
    response_length,
    segments_of,
)
from e3rl.errors import UserError
from e3rl.models import Outline, load_outline, load_policy

LAB = ModelConfig(path="lab", device="cpu")
MATHS = [{"question": f"{n}+1:", "rationale": f"{n}+1={n + 1};A:{n + 1}", "ground_truth": n + 1} for n in range(40)]


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_outline_says_what_the_policy_says():
    outline, policy = load_outline(LAB), load_policy(LAB)
    assert (outline.eos_ids, outline.context_length, outline.source) == (
        policy.eos_ids,
        policy.context_length,
        policy.source,
    )


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "solution"),
    [
        ({"problem": "1+1", "answer": "2", "solution": "it is 2"}, "problem", "answer", "solution"),
        ({"prompt": [{"role": "user", "content": "1+1"}], "gold": 2}, "prompt", "gold", ""),
        ({"text": "1+1", "prompt": ""}, "text", "", ""),
        ({"question": "1+1", "solution": "so \\boxed{2}"}, "question", "solution", "solution"),
        ({"question": "1+1", "solution": "so 2"}, "question", "", "solution"),
        ({"question": "1", "result": 2}, "question", "result", ""),
        ({"prompt": "1", "reward_model": {"ground_truth": "2"}}, "prompt", "reward_model.ground_truth", ""),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "question": "q"},
            "question",
            "",
            "",
        ),
    ],
)
def test_columns_are_told_apart_by_name_and_content(row: dict, prompt: str, answer: str, solution: str):
    found = find_columns([row, row], "file")
    assert (found.prompt, found.answer, found.solution) == (prompt, answer, solution)


def test_a_column_that_is_empty_in_one_row_is_not_chosen():
    found = find_columns([{"prompt": "a", "question": "b"}, {"prompt": " ", "question": "c"}], "file")
    assert found.prompt == "question"


def test_data_without_a_prompt_name_their_columns():
    with pytest.raises(UserError, match="Columns found: q, n"):
        find_columns([{"q": 1, "n": "x"}], "file")


@pytest.mark.parametrize(("limit", "expected"), [(1024, (128, 8)), (100, (13, 8)), (40, (14, 3)), (5, (5, 1))])
def test_a_limit_is_divided_into_segments_that_hold_a_step(limit: int, expected: tuple[int, int]):
    assert segments_of(limit) == expected


def test_percentiles_are_values_that_occur():
    assert [percentile([5, 1, 2, 3, 4], share) for share in (0.0, 0.5, 0.8, 0.95, 1.0)] == [1, 3, 4, 5, 5]


def _outline(context: int, template: str = "") -> Outline:
    tokenizer = type("Tokenizer", (), {"chat_template": template})()
    return Outline(tokenizer, "m", (0,), context, None)


def test_the_longest_response_follows_solutions_thinking_and_context():
    solved = Lengths((10, 20), tuple(range(1, 101)), "solution")
    unsolved = Lengths((10, 20), (), "")
    assert response_length(solved, _outline(4096))[0] == 190  # twice the 95th of 1 to 100
    assert response_length(unsolved, _outline(4096))[0] == 1024
    assert response_length(solved, _outline(100))[0] == 79  # 100 - 20 - 1
    assert response_length(solved, _outline(9999, "{% if enable_thinking %}"))[0] == 4096
    assert response_length(solved, _outline(4096), 333)[0] == 333
    with pytest.raises(UserError, match="leaves 79 tokens"):
        response_length(solved, _outline(100), 333)
    with pytest.raises(UserError, match="nothing is left"):
        response_length(solved, _outline(25))


def test_lengths_are_those_of_the_rendered_prompt_and_the_bare_solution(tmp_path: Path):
    source = _write(tmp_path / "maths.jsonl", MATHS)
    columns, config = look_at(source, DataConfig())
    found = measure(load_problems(source, config=config, split="train"), load_outline(LAB), config, columns)
    tokenizer = load_outline(LAB).tokenizer
    chat = [{"role": "user", "content": "10+1:"}]
    assert found.prompts[10] == len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    assert found.solutions[10] == len(tokenizer.encode("10+1=11;A:11", add_special_tokens=False))


def test_the_test_half_is_found_by_its_name(tmp_path: Path):
    train = _write(tmp_path / "gsm_train.jsonl", MATHS)
    assert held_out_beside(train) == ""
    test = _write(tmp_path / "gsm_test.jsonl", MATHS)
    assert held_out_beside(train) == test
    assert held_out_beside("owner/name") == ""


def test_init_writes_a_recipe_with_reasons_that_loads_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source, recipe = _write(tmp_path / "maths.jsonl", MATHS), tmp_path / "mine.toml"
    assert main(["init", "lab", source, "--output", str(recipe)]) == 0
    config = load_config(recipe)
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "ground_truth")
    assert config.data.solution_column == "rationale"
    assert (config.rollout.segment_length, config.rollout.max_segments) == (12, 2)  # 95 % have at most 12 tokens
    assert config.rewards.functions == ("math",)
    assert (config.train.steps, config.train.prompts_per_step) == (20, 10)  # an epoch of 40 problems has several steps
    text = recipe.read_text()
    assert "an epoch has 4 steps" in text
    assert "# Nothing is evaluated: no file of held-out problems" in text
    assert "[eval]" not in text
    assert "# responses of up to 24 tokens: twice what 95 % of the data's own solutions need" in text
    assert "it grades 40 of 40 reference answers as right" in text
    monkeypatch.chdir(tmp_path)
    small = ["train.steps=1", "train.prompts_per_step=2", "rollout.num_generations=2", "erasure.rho=0"]
    assert main(["train", str(recipe), *small]) == 0
    capsys.readouterr()
    assert main(["init", "lab", source, "--output", str(recipe)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_init_names_the_lab_s_reward_and_one_to_write(tmp_path: Path):
    bare = _write(tmp_path / "bare.jsonl", [{"prompt": "tell a joke"}])
    for source, reward in (("lab:path:1", "lab"), (bare, "my_rewards.py:reward")):
        recipe = tmp_path / f"{reward[:3]}.toml"
        assert main(["init", "lab", source, "--output", str(recipe)]) == 0
        assert load_config(recipe).rewards.functions == (reward,)
        assert ("[eval]\n# held-out" in recipe.read_text()) == (source != bare)
        assert ("Nothing is evaluated" in recipe.read_text()) == (source == bare)


def test_data_shows_lengths_columns_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, recipe = _write(tmp_path / "maths.jsonl", MATHS), tmp_path / "r.toml"
    recipe.write_text(f'[data]\ntrain = "{source}"\nprompt_column = "question"\nanswer_column = "ground_truth"\n')
    settings = ["rollout.segment_length=10", "rollout.max_segments=2", "data.max_prompt_length=6"]
    assert main(["data", str(recipe), "--show", "1", *settings]) == 0
    text = capsys.readouterr().out
    assert "problems      40, 40 with an answer (column 'ground_truth')" in text
    assert "other columns rationale, ground_truth" in text
    assert "prompt tokens 8 to 9, median 9, 95 % have at most 9" in text
    assert "limit         6 tokens a prompt beside responses of up to 20, and 40 are longer" in text
    assert "| <|begin|><|user|>0+1:<|end|><|assistant|>" in text
    assert "answer: '1'" in text
