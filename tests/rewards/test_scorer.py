"""The scorer with reward functions in TRL's and in verl's signature, alone and several together."""

from __future__ import annotations

import asyncio
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.batch import TrainerState
from e3rl.rewards.scorer import Scorer
from e3rl.types import Reward
from tests.rewards.build import CHAT, TEXTS, TWO, named, score, trajectory, values

# --- TRL's signature


def test_trl_arguments_and_columns_with_none_where_absent() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.5, 1.5]

    assert score(reward) == [Reward(0.5, {"reward": 0.5}), Reward(1.5, {"reward": 1.5})]
    callables = {name: seen.pop(name) for name in ("log_metric", "log_extra")}
    assert all(callable(f) for f in callables.values())
    assert seen == {
        "prompts": ["q1", "q2"],
        "completions": ["one", "2"],
        "completion_ids": [[0, 1], [0, 1, 2, 3]],
        "answer": ["1", "2"],
        "id": ["a", "b"],
        "level": [3, None],
        "solution": [None, "two"],
        "trainer_state": TrainerState(),
    }


def test_chat_prompts_come_as_messages() -> None:
    def reward(prompts: Any, completions: Any) -> list[float]:
        assert prompts == [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]]
        assert completions == [[{"role": "assistant", "content": "hi"}]]
        return [1.0]

    assert values(score(reward, trajectories=[CHAT], texts=["hi"])) == [1.0]


def test_a_function_gets_only_what_it_names() -> None:
    def by_name(completions: Any, level: Any) -> list[float]:
        return [float(x or 0) for x in level]

    def own(trajectories: Any, max_completion_length: int) -> list[float]:
        return [t.committed_tokens / max_completion_length for t in trajectories]

    assert values(score(by_name)) == [3.0, 0.0]
    assert values(score(own, max_completion_length=8)) == [0.25, 0.5]


def test_log_functions_and_trainer_state() -> None:
    def reward(completions: Any, trainer_state: Any, log_extra: Any, log_metric: Any) -> list[float]:
        log_metric("half", 1)
        log_metric("half", 0)
        log_extra("said", completions)
        return [float(trainer_state.global_step)] * len(completions)

    with Scorer(RewardsConfig(), functions=[reward]) as scorer:
        scorer.trainer_state = TrainerState(global_step=7, max_steps=9)
        assert values(scorer.score(TWO, TEXTS)) == [7.0, 7.0]
        assert scorer.log.metrics == {"half": [1.0, 0.0]}
        assert scorer.log.extras == {"said": ["one", "2"]}
        scorer.score(TWO, TEXTS)
        assert scorer.log.metrics == {"half": [1.0, 0.0]}, "the log is of one batch"


async def async_reward(completions: Any, **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


def test_async_functions_also_from_inside_a_loop() -> None:
    assert values(score(async_reward)) == [3.0, 1.0]

    async def notebook() -> list[float | None]:
        return values(score(async_reward))

    assert asyncio.run(notebook()) == [3.0, 1.0]


def test_async_calls_share_one_loop() -> None:
    loops = []

    async def reward(completions: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    score(reward)
    score(reward)
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()


@pytest.mark.parametrize(
    "returned",
    [(1, 0), np.array([1, 0]), torch.tensor([1.0, 0.0]), [True, False], [np.float32(1), torch.tensor(0)], iter([1, 0])],
    ids=["tuple", "numpy", "torch", "bool", "scalars", "iterator"],
)
def test_numbers_of_any_library(returned: Any) -> None:
    rewards = score(lambda completions: returned)
    assert values(rewards) == [1.0, 0.0]
    assert all(type(r.value) is float for r in rewards)


# --- verl's signature


def test_verl_score_and_dict() -> None:
    def compute_score(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None) -> Any:
        if solution_str == "one":
            return 0.25
        return {"score": 1.0, "acc": True, "length": 3, "pred": "text", "bad": math.nan}

    rewards = score(compute_score)
    assert rewards[0] == Reward(0.25, {"compute_score": 0.25})
    assert rewards[1] == Reward(1.0, {"compute_score": 1.0, "compute_score/acc": 1.0, "compute_score/length": 3.0})


def test_verl_arguments() -> None:
    seen = []

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return 1.0

    rows = [
        trajectory("q", None, data_source="gsm8k", reward_model={"ground_truth": "4"}, extra_info={"index": 1}),
        trajectory("q", "5", level=2),
    ]
    score(compute_score, trajectories=rows, texts=["x", "y"])
    assert seen == [("gsm8k", "x", "4", {"index": 1}), ("", "y", "5", {"level": 2})]


def test_verl_async_calls_run_together() -> None:
    waiting, most = 0, 0

    async def compute_score(solution_str: str, ground_truth: str) -> float:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.05)
        waiting -= 1
        return float(solution_str == ground_truth)

    assert values(score(compute_score)) == [0.0, 1.0]
    assert most == 2


def test_verl_failures_cost_one_item_each() -> None:
    def compute_score(solution_str: str, ground_truth: str) -> Any:
        if solution_str == "one":
            raise KeyError("x")
        return {"acc": 1}

    first, second = score(compute_score)
    assert first.error is not None
    assert first.error.startswith("compute_score: raised KeyError: 'x' (test_scorer.py:")
    assert second.error == "compute_score: returned a dict without 'score': acc"
    assert values([first, second]) == [None, None]
    (reward,) = score(compute_score, trajectories=[trajectory("q", None)], texts=["x"])
    assert reward.error is not None
    assert "problem 'p' has no answer to compare with (data.answer_column)" in reward.error


# --- several functions


def test_weighted_sum_keeps_unweighted_parts_in_order() -> None:
    def a(completions: Any) -> list[float]:
        return [1.0, 2.0]

    def b(completions: Any) -> list[float | None]:
        return [10.0, None]

    rewards = score(a, b, weights=(0.5, -1.0))
    assert rewards == [Reward(-9.5, {"a": 1.0, "b": 10.0}), Reward(1.0, {"a": 2.0, "b": None})]
    assert [list(r.parts) for r in rewards] == [["a", "b"]] * 2


def test_none_from_all_functions_is_missing_and_zero_is_not() -> None:
    first, second = score(lambda completions: [None, 0], lambda completions: [None, None])
    assert (first.value, first.error) == (None, "no reward function gave a value")
    assert (second.value, second.error) == (0.0, None)


def test_names_of_equal_and_unnamed_functions() -> None:
    class Judge:
        def __call__(self, completions: Any) -> list[float]:
            return [1.0, 1.0]

    def f(completions: Any, value: float = 1.0) -> list[float]:
        return [value, value]

    (reward, _) = score(f, functools.partial(f, value=2.0), Judge(), f)
    assert dict(reward.parts) == {"f": 1.0, "f_2": 2.0, "Judge": 1.0, "f_3": 1.0}
    assert reward.value == 5.0


def test_functions_by_name() -> None:
    here = Path(__file__).parent / "functions.py"
    (reward, _) = named("tests.rewards.functions:length", f"{here}:compute_score", texts=["1", "2"])
    assert dict(reward.parts) == {"length": 1.0, "compute_score": 1.0, "compute_score/chars": 1.0}
    assert reward.value == 2.0


def test_names_that_are_wrong() -> None:
    for name, message in {
        "maths": "unknown reward 'maths'. Did you mean 'math'?",
        "tests.rewards.functions:nothing": "has no 'nothing'",
        "tests.rewards.functions:not_a_function": "is int, not a function",
        "no_such_module:f": "can't be imported",
    }.items():
        with pytest.raises(UserError, match=message):
            Scorer(RewardsConfig(functions=(name,)))


def test_weights_must_match_the_functions() -> None:
    with pytest.raises(UserError, match=r"rewards.weights has 1 values for 2 reward functions"):
        Scorer(RewardsConfig(weights=(1.0,)), functions=[len, len])
