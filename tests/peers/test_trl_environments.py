# ruff: noqa: E501
"""The same environment class and the same model outputs, turn by turn, in TRL's trainer and here: ids, masks, rewards.

TRL pins its own dependencies, so this runs in an environment of its own (`make test-peers`) and is skipped elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed here; `make test-peers` installs it in its own environment")
pytest.importorskip("jmespath", reason="TRL needs jmespath for tools")

import trl
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from e3rl.environments.episodes import tool_prompts
from e3rl.lab.pretrain import build_model
from e3rl.plugins import load
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Message, Problem
from tests.environments.worlds import CALL, COUNTER, LIMITS, TextEngine, add, tokenizer, world
from tests.rollout.worlds import MEAN_ONLY

TURNS = {
    "two turns": [f"Let me see. {add(2)}", add(4), "It stands at 9."],
    "no call": ["It stands at 3."],
    "an error": [add(10), CALL.format("fly", "{}"), "No."],
    "two calls at once": [add(1) + "\n" + add(2), "It stands at 6."],
    "an asynchronous tool": [CALL.format("ask", "{}"), "It stands at 3."],
    "a call that is none": ["<tool_call>\nnot json\n</tool_call>"],
}


def templates() -> Path:
    return Path(trl.__file__).parent / "chat_templates"


SEVERAL = (
    COUNTER
    + """

class Silent:
    def reset(self, **row):
        pass

    def wait(self) -> str:
        \"\"\"Do nothing.\"\"\"
        return "nothing"


ALL = {"counting": Counter, "silent": Silent}
"""
)
ASYNC = COUNTER.replace("def get_reward", "async def get_reward")
CASES = [
    *((name, COUNTER, {}) for name in TURNS),
    ("two turns", SEVERAL, {"environment": "counting"}),
    ("an error", ASYNC, {}),
]


def in_trl(directory: Path, factory: Any, name: str, columns: dict[str, Any]) -> dict[str, Any]:
    """What TRL makes of a prompt whose completions are the scripted turns."""
    tokens = tokenizer((templates() / "qwen2_5.jinja").read_text())
    arguments = GRPOConfig(
        output_dir=str(directory), use_cpu=True, bf16=False, report_to=[], save_strategy="no", num_generations=2,
        per_device_train_batch_size=2, max_completion_length=2048, disable_tqdm=True,
    )  # fmt: skip
    row = {"prompt": [{"role": "user", "content": "Count."}], **columns}
    model = build_model(tokens)
    model.config.max_position_embeddings = 8192  # a token a character, and tools are long
    trainer = GRPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list([row]), processing_class=tokens,
        environment_factory=factory,
    )  # fmt: skip
    turn = iter(TURNS[name])

    def say(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        ids = tokens(next(turn), add_special_tokens=False)["input_ids"]
        return [[*ids, tokens.eos_token_id] for _ in prompt_ids], None

    trainer._generate_single_turn = say
    seen: dict[str, Any] = {}
    calculate = trainer._calculate_rewards

    def watched(inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        seen["ids"], seen["rewards"] = completion_ids[0], calculate(inputs, prompts, completions, completion_ids)
        return seen["rewards"]

    trainer._calculate_rewards = watched
    found = trainer._generate_and_score_completions([row, row])
    prompt, held = found["prompt_ids"][0], found["prompt_mask"][0].bool()
    seen["prompt"] = prompt[held].tolist()
    count = len(seen["ids"])
    seen["mask"] = found["tool_mask"][0][:count].bool().tolist() if "tool_mask" in found else [True] * count
    return {**seen, "reward": float(seen["rewards"][0, 0])}


@pytest.mark.parametrize(("name", "source", "own"), CASES, ids=[*TURNS, "one of several", "an asynchronous reward"])
def test_turn_by_turn_as_in_trl(tmp_path: Path, name: str, source: str, own: dict[str, Any]):
    config = world(tmp_path, source, several="ALL" if own else "")
    columns = {"start": 3, **own}
    theirs = in_trl(tmp_path, load("environment", config.environments.factory, {}), name, columns)
    tokens = tokenizer((templates() / "qwen2_5.jinja").read_text())
    problem = Problem("p", (Message("user", "Count."),), columns=columns)
    prompts = tool_prompts([problem], tokens, config, **LIMITS)
    engine = TextEngine(
        lambda context, draw: TURNS[name][context.split("It stands at 3.<", 1)[1].count("<|im_start|>assistant") - 1],
        tokens,
    )
    [group] = run_groups(engine, prompts, GroupSettings(config.rollout, MEAN_ONLY, seed=1))
    [trajectory] = group.trajectories
    assert tokens.decode(list(trajectory.prompt.ids)) == tokens.decode(theirs["prompt"])
    assert tokens.decode(trajectory.ids.tolist()) == tokens.decode(theirs["ids"])
    assert trajectory.ids.tolist() == theirs["ids"]
    assert trajectory.drawn_T.tolist() == theirs["mask"]
    with Scorer(config.rewards) as scorer:
        [reward] = scorer.score([trajectory], [""])
    assert reward.value == theirs["reward"]
    print(
        f"\n{name}: {len(theirs['ids'])} ids, {len(theirs['ids']) - sum(theirs['mask'])} of them results; reward {json.dumps(reward.value)}"
    )
