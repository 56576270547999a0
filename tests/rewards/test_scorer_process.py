"""e3rl's own form of rewards, functions in processes of their own, and what a function must not do to the run."""

from __future__ import annotations

import locale
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e3rl import plugins
from e3rl.config import RewardsConfig
from e3rl.errors import UserError
from e3rl.rewards.batch import Batch, BatchReward, Part
from e3rl.rewards.scorer import Scorer
from e3rl.types import Reward
from tests.rewards.build import named, score, trajectory, values

# --- e3rl's own form, and isolation


def test_batch_rewards_see_trajectories_and_may_fail() -> None:
    class Erasures(BatchReward):
        def score(self, batch: Batch) -> list[Part]:
            return [Part(float(len(t.erasures)), details={"tokens": t.committed_tokens}) for t in batch.trajectories]

    class Broken(BatchReward):
        def score(self, batch: Batch) -> list[Part]:
            raise RuntimeError("no")

    assert score(Erasures)[0] == Reward(0.0, {"Erasures": 0.0, "Erasures/tokens": 2})
    assert str(score(Broken)[0].error).startswith("Broken: raised RuntimeError: no (test_scorer_process.py:")


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
