"""The contract suites of metrics and rewards: what the package has keeps them, and what breaks them is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from e3rl.config import ErasureConfig
from e3rl.errors import UserError
from e3rl.lab.problems import generate
from e3rl.lab.reward import lab_reward
from e3rl.rewards.builtin import format_reward, overlong_reward
from e3rl.rollout.metric import UNCERTAINTY_METRICS, e3rl_uncertainty, load_metric, single_term
from e3rl.rollout.moments import Moments
from e3rl.testing.metric import check_metric
from e3rl.testing.reward import check_reward
from e3rl.types import Candidate, Uncertainty

counter = itertools.count()


@pytest.mark.parametrize("name", UNCERTAINTY_METRICS)
def test_the_packages_metrics_keep_the_contract(name: str):
    check_metric(load_metric(name), name)


def of_total(total: Callable[[Candidate], float]) -> Callable[..., Uncertainty]:
    def metric(
        candidate: Candidate, history: Sequence[float], reference: Moments, config: ErasureConfig
    ) -> Uncertainty:
        return single_term(total(candidate))

    return metric


def test_a_metric_of_one_number_keeps_the_contract():
    check_metric(of_total(lambda c: max(c.entropies)))


def raising(total: Uncertainty) -> Uncertainty:
    return replace(total, total=total.total + 0.1)


def forgetful(candidate: Candidate, history: list[float], reference: Moments, config: ErasureConfig) -> Uncertainty:
    history.clear()
    return single_term(1.0)


BROKEN_METRICS: list[tuple[Any, str]] = [
    (of_total(lambda c: -1.0), "U is -1.0; below 0"),
    (of_total(lambda c: math.nan), "must be a finite number"),
    (of_total(lambda c: 1 / len(c.ids[1:])), "it failed on 1 tokens with ZeroDivisionError"),
    (of_total(lambda c: float(next(counter))), "two different U"),
    (of_total(lambda c: str(c)), "must be a finite number"),
    (lambda candidate, history, reference, config: 1.0, "must return an Uncertainty, and returned a float"),
    (lambda *a: raising(e3rl_uncertainty(*a)), "the terms of U must add up"),
    (lambda candidate: single_term(1.0), "it failed on 3 tokens with TypeError"),
    (forgetful, "AttributeError: 'tuple' object has no attribute 'clear'"),
    (Moments, "must be a function, and is a type"),
    (3, "must be a function, and is a int"),
]


@pytest.mark.parametrize(("metric", "clause"), BROKEN_METRICS, ids=[c for _, c in BROKEN_METRICS])
def test_a_broken_metric_is_named_with_its_clause(metric: Any, clause: str):
    with pytest.raises(UserError, match=f"uncertainty metric 'mine' breaks its contract: .*{clause}"):
        check_metric(metric, "mine")


def test_the_packages_reward_functions_keep_the_contract():
    check_reward(format_reward)
    check_reward(overlong_reward)
    check_reward(lab_reward, generate("chain", 1, "train", 3))


def verl_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    return {"score": float(ground_truth in solution_str), "length": len(solution_str)}


async def slow(completions: list[Any], **_: Any) -> list[float | None]:
    return [None for _ in completions]


@pytest.mark.parametrize("function", [verl_score, slow])
def test_other_signatures_keep_the_contract(function: Callable[..., Any]):
    check_reward(function)


def greedy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    answer[0] = "mine"
    return [0.0] * len(completions)


BROKEN_REWARDS: list[tuple[Any, str]] = [
    (lambda completions, **_: [1.0], r"for 2 response\(s\) it returned 1 values for 2 completions"),
    (lambda completions, **_: 1.0, "it returned float, not a list of 1 numbers"),
    (lambda completions, **_: ["yes" for _ in completions], "it returned str, not a number"),
    (lambda completions, **_: [math.nan for _ in completions], "it returned nan"),
    (lambda completions, proof: [1.0], "it needs proof; the data has the columns id, solution, answer"),
    (lambda completions, **_: [1 / len(c) for c in completions], r"for 5 response\(s\) it raised ZeroDivisionError"),
    (lambda completions, **_: [float(c.strip() == "2") for c in completions], r"AttributeError.*\(on chat prompts\)"),
    (lambda data_source, solution_str, ground_truth: {"points": 1.0}, "it returned a dict without 'score': points"),
    (greedy, "it changed its arguments in place"),
    (3, "it must be a function, and is a int"),
]


@pytest.mark.parametrize(("function", "clause"), BROKEN_REWARDS, ids=[c for _, c in BROKEN_REWARDS])
def test_a_broken_reward_is_named_with_its_clause(function: Any, clause: str):
    with pytest.raises(UserError, match=f"reward 'mine' breaks its contract: .*{clause}"):
        check_reward(function, name="mine")
