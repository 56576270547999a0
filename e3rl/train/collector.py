"""Prompts to rewarded groups: what a step is trained on, collected for it when it begins or while the step before trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from e3rl.cluster.messages import Finished, finished_of, group_of
from e3rl.cluster.rollouts import Rollouts
from e3rl.cluster.together import SharedScorer
from e3rl.cluster.wire import from_plain, to_plain
from e3rl.config import Config
from e3rl.data.stream import PromptStream
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer, require_some
from e3rl.rollout.filters import Collected, GroupFilter, collect
from e3rl.rollout.group import GroupSettings
from e3rl.types import Group, Prompt, Reward, RewardedGroup


@dataclass(frozen=True)
class Harvest:
    """A step's groups, and the seconds that rollouts and rewards took."""

    collected: Collected
    rollout_seconds: float
    reward_seconds: float


@dataclass(frozen=True)
class Hooks:
    """Who is told of what happens, and who may stop it."""

    tick: Callable[[], None]
    tell: Callable[..., None]


class Collector:
    """Takes prompts from the stream until enough groups pass the filter."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        stream: PromptStream,
        rollouts: Rollouts,
        scorer: Scorer | SharedScorer,
        keep: GroupFilter,
        *,
        demonstrations: Mapping[str, RewardedGroup],
        prompts: Mapping[str, Prompt],
        hooks: Hooks,
    ) -> None:
        self._config, self._policy, self._stream, self._rollouts = config, policy, stream, rollouts
        self._scorer, self._keep, self._demonstrations = scorer, keep, demonstrations
        self._prompts, self._hooks = prompts, hooks

    def collect(self, assignment: GroupSettings, tick: Callable[[], None] | None = None) -> Harvest:
        """The groups of a step; ``tick`` is called often and may raise to stop."""
        wanted, seconds = self._config.train.prompts_per_step, [0.0, 0.0]
        rewards: list[Reward] = []  # of the step so far: a refill may be a single group, and its rewards all missing

        def make(prompts: Sequence[Prompt]) -> list[RewardedGroup]:
            if self._demonstrations:
                return [self._demonstrations[prompt.problem.id] for prompt in prompts]
            began = time.perf_counter()
            groups = self._roll_out(prompts, assignment, tick or self._hooks.tick)
            rolled = time.perf_counter()
            rewarded = self._reward(groups)
            rewards.extend(r for item in rewarded for r in item.rewards)
            require_some(rewards)
            seconds[0] += rolled - began
            seconds[1] += time.perf_counter() - rolled
            return rewarded

        collected = collect(
            wanted,
            self._stream.take,
            make,
            self._keep,
            max_refills=self._config.filter.max_refills,
            available=len(self._prompts),
        )
        if len(collected.kept) < wanted:
            self._hooks.tell(
                "noted",
                f"step {assignment.step} trains on {len(collected.kept)} of {wanted} groups: filter "
                f"'{self._config.filter.name}' dropped {len(collected.dropped)}, after {collected.refills} refills",
            )
        return Harvest(collected, seconds[0], seconds[1])

    def _roll_out(self, prompts: Sequence[Prompt], assignment: GroupSettings, tick: Callable[[], None]) -> list[Group]:
        order = {prompt.problem.id: i for i, prompt in enumerate(prompts)}
        groups = []
        for group in self._rollouts.run(prompts, assignment, tick=tick):
            groups.append(group)
            self._hooks.tell("progressed", "rollout", len(groups), len(prompts))
        groups.sort(key=lambda g: order[g.prompt.problem.id])
        return groups

    def _reward(self, groups: Sequence[Group]) -> list[RewardedGroup]:
        trajectories = [t for g in groups for t in g.trajectories]
        texts = [self._policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in trajectories]
        following = iter(self._scorer.score(trajectories, texts))
        return [RewardedGroup(g, tuple(next(following) for _ in g.trajectories)) for g in groups]

    def to_table(self, harvest: Harvest) -> dict[str, Any]:
        """A harvest as plain JSON values, prompts by their ids."""
        found = harvest.collected
        return {
            **{name: [_to_plain(g) for g in getattr(found, name)] for name in ("kept", "dropped")},
            "refills": found.refills,
            "seconds": [harvest.rollout_seconds, harvest.reward_seconds],
        }

    def from_table(self, table: Mapping[str, Any]) -> Harvest:
        """The harvest that `to_table` wrote down."""
        kept, dropped = (tuple(self._from_plain(g) for g in table[name]) for name in ("kept", "dropped"))
        return Harvest(Collected(kept, dropped, table["refills"]), *table["seconds"])

    def _from_plain(self, plain: Mapping[str, Any]) -> RewardedGroup:
        finished: Finished = from_plain(Finished, plain["group"], "group")
        assignment = GroupSettings(
            self._config.rollout, self._config.erasure, 0, step=0, policy_version=finished.policy_version
        )
        group = group_of(finished, self._prompts[finished.prompt_id], assignment, self._policy.vocabulary)
        return RewardedGroup(group, tuple(from_plain(Reward, r, "reward") for r in plain["rewards"]))


def _to_plain(item: RewardedGroup) -> dict[str, Any]:
    return {"group": to_plain(finished_of(item.group)), "rewards": to_plain(item.rewards)}


class Ahead:
    """Collects the next step's groups in a thread, by weights that nobody changes meanwhile.

    A stop that is asked for waits for it: what is under way belongs to the state of the run.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._coming: Future[Harvest] | None = None
        self.harvest: Harvest | None = None  # what the next step will be trained on

    def start(self, assignment: GroupSettings) -> None:
        """Begin to collect for the step that ``assignment`` names."""
        self._coming = self._thread.submit(self._collector.collect, assignment, lambda: None)

    def wait(self) -> None:
        """Until what was started is there. Its time beside the training is no time of the run."""
        if self._coming is None:
            return
        began = time.perf_counter()
        harvest = self._coming.result()
        self._coming = None
        self.harvest = replace(harvest, rollout_seconds=time.perf_counter() - began, reward_seconds=0.0)

    def take(self) -> Harvest | None:
        """What was collected, if anything was, once."""
        harvest, self.harvest = self.harvest, None
        return harvest

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
