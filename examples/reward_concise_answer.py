"""Complete reward functions from outside the package, one in TRL's signature and one in verl's, used unchanged.

Train with one:  e3rl train RECIPE "rewards.functions=['math', 'examples/reward_concise_answer.py:concise']"
With weights:    ... "rewards.weights=[1.0, 0.2]"
In a worker:     ... rewards.isolate=true        (a hang or crash then costs one reward, never the run)
Check them:      python examples/reward_concise_answer.py

Which signature it is shows in the names of the parameters. TRL's gets whole batches: `prompts`, `completions`,
`completion_ids` and every column of the data, each a list, as far as it names them; it returns a number or None (no
opinion) for each completion. verl's gets one response and returns a number, or a dict with 'score' whose other numbers
are kept beside it. An exception makes a reward missing, never 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from e3rl.rewards.builtin import completion_text

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def concise(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """TRL: 1 less a thousandth for each character where the last number is the answer, else 0; None without an answer."""
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        text = completion_text(completion)
        right = NUMBER.findall(text)[-1:] == [wanted]
        rewards.append(None if wanted is None else max(0.0, 1 - len(text) / 1000) if right else 0.0)
    return rewards


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, float]:
    """verl: whether the last number is the answer, and how many numbers there were."""
    numbers = NUMBER.findall(solution_str)
    return {"score": float(numbers[-1:] == [ground_truth]), "numbers": float(len(numbers))}


if __name__ == "__main__":
    from e3rl.testing.reward import check_reward

    for function in (concise, compute_score):
        check_reward(function)
        print(f"{function.__name__} keeps the contract of a reward function.")
