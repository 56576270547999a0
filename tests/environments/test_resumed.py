"""Rollouts with tools that are killed in the middle end as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.engine.torch.engine import TorchEngine
from e3rl.models import Policy, load_policy
from e3rl.train.journal import FORMAT, StepJournal
from e3rl.types import Group
from tests.environments.lab_rolls import EVERYTHING, LONGEST, configured, kinds, rolled, trajectories
from tests.train.test_journal import Dying, Killed

ROWS = 12


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(configured().model)


def lives(policy: Policy, polls: list[int | None], journal: Path | None) -> tuple[list[Group], list[int]]:
    """The groups after a death at each of these polls, and the candidates that each life drew."""
    config, drawn = configured("data.train=lab:books:3"), []
    for left in polls:
        engine = TorchEngine(policy.model, eos_ids=policy.eos_ids, max_rows=ROWS, cache_rows=ROWS, max_length=LONGEST)
        dying = Dying(engine, left)
        memory = journal and StepJournal(journal, {"format": FORMAT, "step": 0, "weights": "w"}, lambda _: None)
        try:
            groups = rolled(dying, policy, config, memory)
        except Killed:
            pass
        finally:
            drawn.append(dying.generated)
            if memory:
                memory.close()
    return groups, drawn


@pytest.fixture(scope="module")
def undisturbed(policy: Policy) -> tuple[list[Group], int]:
    groups, [drawn] = lives(policy, [None], None)
    assert kinds(groups) == EVERYTHING
    return groups, drawn


@pytest.mark.parametrize("polls", [[3], [30], [9, 14, 11]], ids=str)
def test_a_rollout_with_tools_killed_anywhere_ends_in_the_same_bits(
    tmp_path: Path, policy: Policy, undisturbed: tuple[list[Group], int], polls: list[int]
):
    """Tokens, calls, results, erased turns, the environments' final states, and no candidate is drawn twice."""
    groups, drawn = lives(policy, [*polls, None], tmp_path / "journal")
    assert groups == undisturbed[0]
    rewards = [[t.environment.get_reward() for t in trajectories(found)] for found in (groups, undisturbed[0])]
    assert rewards[0] == rewards[1]
    assert set(rewards[0]) == {0.0, 1.0}
    assert sum(drawn) == undisturbed[1]
    assert min(drawn) > 0
