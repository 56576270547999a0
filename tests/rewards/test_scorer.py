"""The scorer with every kind of reward function, and with every way they fail."""

from __future__ import annotations

import asyncio
import functools
import locale
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e3rl import plugins
from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.batch import Batch, BatchReward, Part, TrainerState
from e3rl.rewards.scorer import Scorer, require_some
from e3rl.types import Message, Reward, Trajectory
from tests.rewards.build import trajectory

TWO = [trajectory("q1", "1", tokens=2, id="a", level=3), trajectory("q2", "2", tokens=4, id="b", solution="two")]
TEXTS = ["one", "2"]
CHAT = trajectory((Message("system", "s"), Message("user", "u")), "2")


def score(
    *functions: Any,
    trajectories: list[Trajectory] = TWO,
    texts: list[str] = TEXTS,
    weights: tuple[float, ...] = (),
    **options: Any,
) -> list[Reward]:
    with Scorer(RewardsConfig(weights=weights), functions=functions, **options) as scorer:
        return scorer.score(trajectories, texts)


def named(*names: str, texts: list[str] = TEXTS, trajectories: list[Trajectory] = TWO, **settings: Any) -> list[Reward]:
    with Scorer(RewardsConfig(functions=names, **settings), max_completion_length=5) as scorer:
        return scorer.score(trajectories, texts)


def values(rewards: list[Reward]) -> list[float | None]:
    return [r.value for r in rewards]


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


# --- failures are missing rewards, never zeros


def broken(kind: str) -> Any:
    def reward(completions: Any) -> Any:
        if kind == "raise":
            raise RuntimeError("out of order")
        return {
            "short": [1.0],
            "number": 1.0,
            "string": "ab",
            "none": None,
            "dict": {"a": 1, "b": 2},
            "strings": ["1", "2"],
            "nan": [math.nan, math.inf],
            "objects": [object(), [1]],
            "complex": [1j, 2j],
        }[kind]

    return reward


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("raise", "raised RuntimeError: out of order (test_scorer.py:275)"),
        ("short", "returned 1 values for 2 completions"),
        ("number", "returned float, not a list of 2 numbers"),
        ("string", "returned str, not a list of 2 numbers"),
        ("none", "returned NoneType, not a list of 2 numbers"),
        ("dict", "returned dict, not a list of 2 numbers"),
        ("strings", "returned str, not a number"),
        ("nan", "returned nan"),
        ("objects", "returned object, not a number"),
        ("complex", "returned complex, not a number"),
    ],
)
def test_failures(kind: str, error: str) -> None:
    good = lambda completions: [1.0, 1.0]  # noqa: E731
    with Scorer(RewardsConfig(), functions=[broken(kind), good]) as scorer:
        rewards = scorer.score(TWO, TEXTS)
        assert values(rewards) == [None, None]
        assert rewards[0].error == f"reward: {error}"
        assert dict(rewards[0].parts) == {"reward": None, "<lambda>": 1.0}
        assert (scorer.counters.scored, scorer.counters.missing) == (2, 2)
        assert scorer.counters.errors == {"reward": 2}
        assert scorer.counters.first_errors == {"reward": error}
        with pytest.raises(UserError, match=r"all 2 rewards of this batch are missing\. The first: reward: "):
            require_some(rewards)


def test_only_the_items_concerned_are_missing() -> None:
    rewards = score(lambda completions: [math.nan, 1.0])
    assert values(rewards) == [None, 1.0]
    require_some(rewards)


def test_a_missing_column_is_named() -> None:
    def reward(completions: Any, ground_truth: Any) -> list[float]:
        return []

    error = score(reward)[0].error
    assert error is not None
    assert "it needs ground_truth; the data has the columns id, level, solution, answer" in error


def test_async_failures() -> None:
    async def reward(completions: Any) -> list[float]:
        raise OSError("no route")

    assert str(score(reward)[1].error).startswith("reward: raised OSError: no route (test_scorer.py:")


def test_nothing_to_score_and_mismatched_texts() -> None:
    with Scorer(RewardsConfig(), functions=[async_reward]) as scorer:
        assert scorer.score([], []) == []
        with pytest.raises(ValueError, match="1 texts for 2 trajectories"):
            scorer.score(TWO, ["x"])


# --- e3rl's own form, and isolation


def test_batch_rewards_see_trajectories_and_may_fail() -> None:
    class Erasures(BatchReward):
        def score(self, batch: Batch) -> list[Part]:
            return [Part(float(len(t.erasures)), details={"tokens": t.committed_tokens}) for t in batch.trajectories]

    class Broken(BatchReward):
        def score(self, batch: Batch) -> list[Part]:
            raise RuntimeError("no")

    assert score(Erasures)[0] == Reward(0.0, {"Erasures": 0.0, "Erasures/tokens": 2})
    assert str(score(Broken)[0].error).startswith("Broken: raised RuntimeError: no (test_scorer.py:")


def test_isolated_functions_cost_one_reward_each() -> None:
    texts = ["fine", "hang", "crash", "raise", "fine"]
    config = RewardsConfig(functions=("tests.rewards.functions:treacherous",), isolate=True, workers=2, timeout=1.0)
    with Scorer(config) as scorer:
        rewards = scorer.score([trajectory() for _ in texts], texts)
        assert values(rewards) == [1.0, None, None, None, 1.0]
        assert [r.error for r in rewards[1:4]] == [
            "treacherous: took longer than 1 s; its worker was killed",
            "treacherous: the worker died twice (SIGKILL)",
            "treacherous: raised RuntimeError: no (functions.py:30)",
        ]
        assert scorer.worker_restarts == 3
        assert sorted(scorer.log.metrics["chars"]) == [4, 4, 5]
        assert scorer.log.extras == {"shout": ["FINE", None, None, "RAISE", "FINE"]}


def test_isolated_verl_function_keeps_its_details() -> None:
    rewards = named("tests.rewards.functions:compute_score", isolate=True, texts=["1", "3"])
    assert rewards[0] == Reward(1.0, {"compute_score": 1.0, "compute_score/chars": 1.0})
    assert values(rewards) == [1.0, 0.0]


def test_batch_rewards_run_here_even_when_others_are_isolated() -> None:
    (first, _) = named("tests.rewards.functions:CountErasures", isolate=True)
    assert first == Reward(0.0, {"CountErasures": 0.0})


def test_isolation_needs_names() -> None:
    with pytest.raises(UserError, match="name them in"):
        Scorer(RewardsConfig(isolate=True), functions=[len])


# --- what a function must not do to the run


def leaves(completions: Any, **kwargs: Any) -> list[float]:
    sys.exit(0)


async def leaves_later(completions: Any, **kwargs: Any) -> list[float]:
    sys.exit(0)


def test_a_function_that_ends_the_process_costs_its_rewards_and_is_named() -> None:
    for function in (leaves, leaves_later):
        assert score(function)[0].error == f"{function.__name__}: called sys.exit(0)"


def test_a_function_that_moves_the_process_is_named_and_undone(tmp_path: Path) -> None:
    def moves(completions: Any) -> list[float]:
        os.chdir(tmp_path)
        return [1.0] * len(completions)

    here = os.getcwd()
    error = f"moves: changed the working directory to {tmp_path}; it was changed back"
    assert [r.error for r in score(moves)] == [error] * 2
    assert os.getcwd() == here


async def moves_later(completions: Any, **kwargs: Any) -> list[float]:
    os.chdir("/")
    return [1.0] * len(completions)


async def moves_later_as_verl(solution_str: str, ground_truth: str) -> float:
    os.chdir("/")
    return 1.0


@pytest.mark.parametrize("function", [moves_later, moves_later_as_verl])
def test_an_async_function_that_moves_the_process_is_named_and_undone(function: Any) -> None:
    here = os.getcwd()
    error = f"{function.__name__}: changed the working directory to /; it was changed back"
    assert [r.error for r in score(function)] == [error] * 2
    assert os.getcwd() == here


def _sets_umask() -> None:
    os.umask(0o077)


def _sets_locale() -> None:
    locale.setlocale(locale.LC_ALL, "C" if locale.setlocale(locale.LC_ALL) != "C" else "C.UTF-8")


def _sets_handler() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _sets_variable() -> None:
    os.environ["CHANGED_BY_A_REWARD"] = "secret"


def _sets_path() -> None:
    sys.path[:0] = ["/nowhere/secret"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_sets_umask, "the umask changed; put back"),
        (_sets_locale, "the locale changed; put back"),
        (_sets_handler, "the handler of SIGTERM changed; put back"),
        (_sets_variable, "CHANGED_BY_A_REWARD changed; that stays"),
        (_sets_path, "sys.path changed; that stays"),
    ],
)
def test_what_a_function_changes_in_the_process_is_put_back_or_said_once(
    change: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    plugins._say_once.cache_clear()

    def changes(completions: Any) -> list[float]:
        change()
        return [1.0] * len(completions)

    before = plugins.ProcessState.now()
    for _ in range(2):
        assert values(score(changes)) == [1.0, 1.0]
    printed = capsys.readouterr().err
    assert printed.count(said) == 1
    assert "secret" not in printed
    assert (before == plugins.ProcessState.now()) is ("put back" in said)


def test_a_forked_child_that_returns_is_no_second_run(tmp_path: Path) -> None:
    def forks(completions: Any) -> list[float]:
        child = os.fork()
        if child:
            (tmp_path / "status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        return [1.0] * len(completions)

    process = os.getpid()
    rewards = score(forks)
    assert os.getpid() == process, os._exit(1)  # a second run would go on here
    assert values(rewards) == [1.0, 1.0]
    assert (tmp_path / "status").read_text() == "70"


def test_a_plug_in_does_not_take_the_place_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json as real

    monkeypatch.chdir(tmp_path)
    Path("json.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    assert values(named("json.py:one")) == [1.0, 1.0]
    assert sys.modules["json"] is real


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1e308, "returned 1e+308; a reward may be 1e+15 at most"),
        (-1e16, "returned -1e+16; a reward may be 1e+15 at most"),
        (10**400, "returned what is not a number: int too large to convert to float"),
        (10**20, "returned 1e+20; a reward may be 1e+15 at most"),
    ],
)
def test_rewards_too_large_to_compare_are_missing(value: float, error: str) -> None:
    def large(completions: Any) -> list[float]:
        return [value, 1.0]

    rewards = score(large)
    assert rewards[0].error == f"large: {error}"
    assert rewards[1].value == 1.0


def test_a_weighted_sum_too_large_is_missing() -> None:
    def large(completions: Any) -> list[float]:
        return [1e15, 1.0]

    with Scorer(RewardsConfig(weights=(100.0,)), functions=[large]) as scorer:
        rewards = scorer.score(TWO, ["", ""])
    assert [r.value for r in rewards] == [None, 100.0]
    assert rewards[0].error == "the weighted sum is 1e+17; a reward may be 1e+15 at most"
