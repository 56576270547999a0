"""The contract of a reward function, as a test that its author can import and run.

from e3rl.testing.reward import check_reward

def test_contract():
    check_reward(my_reward)                            # TRL's or verl's signature, ordinary or async
    check_reward(my_reward, problems=[...])            # where it needs columns of its own, or chat prompts
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from e3rl.rewards.adapters import adapt
from e3rl.rewards.batch import Batch, Log
from e3rl.rewards.scorer import broken
from e3rl.train.prompts import token_trajectory
from e3rl.types import Message, Problem, Prompt

TOY_PROBLEMS: tuple[Problem, ...] = (
    Problem("toy-1", "1+1=", "2", {"solution": "1+1=2"}),
    Problem("toy-2", "2+2=", "4", {"solution": "2+2=4"}),
    Problem("toy-3", "3+3=", "6", {"solution": "3+3=6"}),
)
TOY_CHATS = tuple(Problem(p.id, (Message("user", str(p.prompt)),), p.answer, p.columns) for p in TOY_PROBLEMS)
RESPONSES = (r"The answer is \boxed{2}.", "4", "", "nothing but words \N{SNOWMAN}", "6" * 300)


def check_reward(
    function: Callable[..., Any],
    problems: Sequence[Problem] = (),
    *,
    name: str | None = None,
    max_completion_length: int = 64,
) -> None:
    """Raises UserError, naming the broken clause, unless ``function`` keeps the whole contract.

    For batches of any size and any text, it must return one finite number or None per response, raise nothing and leave its
    arguments unchanged. Without ``problems`` it is tried on string prompts and on chat prompts, whose completions are lists
    of messages.
    """
    called = name or str(getattr(function, "__name__", type(function).__name__))
    if not callable(function):
        raise broken(called, f"it must be a function, and is a {type(function).__name__}")
    kinds = {"": problems} if problems else {"string prompts": TOY_PROBLEMS, "chat prompts": TOY_CHATS}
    for kind, chosen in kinds.items():
        for size in (1, 2, len(RESPONSES)):
            _check_batch(called, function, chosen, size, max_completion_length, f" (on {kind})" if kind else "")


def toy_batch(problems: Sequence[Problem], size: int, max_completion_length: int) -> Batch:
    """The first ``size`` of `RESPONSES`, to the problems in turn."""
    texts = RESPONSES[:size]
    prompts = [Prompt(problems[i % len(problems)], (2, 3)) for i in range(size)]
    pairs = zip(prompts, texts, strict=True)
    trajectories = [token_trajectory(p, range(2, 3 + min(len(t), max_completion_length - 1)), 0.0) for p, t in pairs]
    return Batch(tuple(trajectories), texts, max_completion_length)


def _check_batch(
    name: str, function: Callable[..., Any], problems: Sequence[Problem], size: int, limit: int, where: str
) -> None:
    batch = toy_batch(problems, size, limit)
    before = _seen(batch)
    parts = adapt(function)(batch, Log())
    failure = next((part.error for part in parts if part.error is not None), None)
    if failure is not None:
        raise broken(name, f"for {size} response(s) it {failure}{where}")
    if _seen(batch) != before:
        raise broken(name, "it changed its arguments in place, which other reward functions share")


def _seen(batch: Batch) -> Any:
    return copy.deepcopy((batch.prompts, batch.completions, batch.columns))
