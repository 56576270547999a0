"""How the ranks of one run share a trainer's work: every rank decides alike, and the first alone writes and speaks."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from e3rl.cluster.ranks import Ranks, join_ranks
from e3rl.cluster.rollouts import Rollouts
from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.group import GroupSettings
from e3rl.train.run_directory import run_path
from e3rl.types import Group, Prompt, Reward, Trajectory


@dataclass(frozen=True)
class Together:
    """The ranks of a run. ``path``: the run's directory, which ranks but the first only read."""

    ranks: Ranks
    path: Path
    remote: bool  # workers elsewhere generate, and the first rank alone speaks with them

    @classmethod
    def of(cls, config: Config) -> Together:
        """The ranks that torchrun started for this config, or this process alone."""
        ranks = join_ranks(config)
        if ranks.world > 1 and config.rollout.ahead:
            raise UserError(
                "rollout.ahead generates beside the training, which ranks can't do yet: set it to 0, or start one"
            )
        return cls(ranks, run_path(config), bool(config.rollout.workers or config.rollout.servers))

    def own(self, config: Config, resume: bool) -> tuple[Config, bool]:
        """The config for this rank, and whether the first rank goes on with a run: then all do.

        Ranks but the first write elsewhere and start no workers.
        """
        resume = self.ranks.gather(resume)[0]
        if self.ranks.first:
            return config, resume
        aside = tempfile.mkdtemp(prefix=f"e3rl-rank-{self.ranks.rank}-")
        run, rollout = replace(config.run, output_dir=aside), replace(config.rollout, workers=0, servers=())
        return replace(config, run=run, rollout=rollout), resume


class SharedRollouts:
    """Each rank generates its share of the groups; all ranks get all of them, in the order of the prompts."""

    def __init__(self, rollouts: Rollouts, together: Together) -> None:
        self._rollouts, self._together = rollouts, together

    def run(self, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> Iterator[Group]:
        """See `Rollouts.run`."""
        ranks = self._together.ranks
        if ranks.world == 1:
            yield from self._rollouts.run(prompts, settings, tick)
            return
        alone = list(prompts) if ranks.first else []
        mine = list(self._rollouts.run(alone if self._together.remote else ranks.share(prompts), settings, tick))
        found = {group.prompt.problem.id: group for group in itertools.chain(*ranks.gather(mine))}
        yield from (found[prompt.problem.id] for prompt in prompts)

    def load_weights(self, version: int) -> None:
        """See `Rollouts.load_weights`."""
        self._rollouts.load_weights(version)

    def close(self) -> None:
        """See `Rollouts.close`."""
        self._rollouts.close()


class SharedScorer:
    """Each rank rewards its share: a function that is not deterministic still gives all ranks the same rewards."""

    def __init__(self, scorer: Scorer, ranks: Ranks) -> None:
        self._scorer, self._ranks = scorer, ranks

    def score(self, trajectories: Sequence[Trajectory], texts: Sequence[str]) -> list[Reward]:
        """See `Scorer.score`."""
        mine, said = self._ranks.share(trajectories), self._ranks.share(texts)
        return self._ranks.merge(self._scorer.score(mine, said) if mine else [])
