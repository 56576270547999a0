"""Where a run's groups come from, with a journal in between: what an earlier process made is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from e3rl.cluster.messages import Assignment, finished_of, group_of
from e3rl.cluster.rollouts import LocalRollouts, Rollouts, build_rollouts
from e3rl.config import Config
from e3rl.engine.protocol import Engine
from e3rl.models import Policy
from e3rl.train.journal import Journal
from e3rl.train.journaled_engine import JournaledEngine
from e3rl.types import Group, Prompt


class JournaledGroups:
    """Implements `e3rl.cluster.rollouts.Rollouts` over workers elsewhere: a group is kept when it arrives."""

    def __init__(self, rollouts: Rollouts, journal: Journal, vocabulary: int) -> None:
        self._rollouts, self._journal, self._vocabulary = rollouts, journal, vocabulary

    def run(self, prompts: Sequence[Prompt], assignment: Assignment, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`: first the groups that are known, then those that had to be made."""
        journal, missing = self._journal.of(assignment.step), []
        for prompt in prompts:
            finished = journal.groups.pop(prompt.problem.id, None)
            if finished is None:
                missing.append(prompt)
            else:
                yield group_of(finished, prompt, assignment, self._vocabulary)
        if missing:
            for group in self._rollouts.run(missing, assignment, tick):
                journal.add_group(finished_of(group))
                yield group

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`."""
        self._rollouts.load_weights(version)

    def close(self) -> None:
        """See `Rollouts.close`."""
        self._rollouts.close()


def journaled_rollouts(
    config: Config, policy: Policy, engine: Engine, longest_prompt: int, journal: Journal, note: Callable[[str], None]
) -> Rollouts:
    """`build_rollouts` with a memory: of candidates where this process generates, of groups where workers do."""
    remembering = JournaledEngine(engine, journal.of)
    rollouts = build_rollouts(config, policy, remembering, longest_prompt, note)
    if isinstance(rollouts, LocalRollouts):
        return rollouts
    return JournaledGroups(rollouts, journal, policy.vocabulary)
