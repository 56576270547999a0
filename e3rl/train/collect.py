"""Prompts to rewarded groups: what a step is trained on, collected when the step begins or while the one before trains."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from e3rl.cluster.ranks import Ranks
from e3rl.data.stream import PromptStream
from e3rl.errors import UserError
from e3rl.rewards.scorer import require_some
from e3rl.rollout.columns import decode, encode
from e3rl.rollout.filters import fresh_prompts
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.ipc import from_ipc, to_ipc
from e3rl.rollout.stats import summarise
from e3rl.train.listeners import Interrupted
from e3rl.types import Group, Prompt, Reward, RewardedGroup

if TYPE_CHECKING:
    from e3rl.train.state import Run


@dataclass(frozen=True)
class StepGroups:
    """A step's rewarded groups: those to train on, those that the filter dropped, and what collecting them took."""

    kept: tuple[RewardedGroup, ...]
    dropped: tuple[RewardedGroup, ...] = ()
    refills: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0

    @property
    def all(self) -> tuple[RewardedGroup, ...]:
        """Kept groups first, so that a position in ``kept`` is the same position here."""
        return self.kept + self.dropped

    @property
    def dropped_tokens(self) -> int:
        """Tokens generated for groups that the filter dropped."""
        return summarise(item.group for item in self.dropped).generated_tokens


def collect(run: Run, stream: PromptStream, settings: GroupSettings, tick: Callable[[], None]) -> StepGroups:
    """Groups of different prompts until enough pass the filter, refills are spent or prompts run out.

    A refill asks for as many groups as are missing, so no group that passes is thrown away. ``tick`` is called often and
    may raise `Interrupted`: then the stream is where it was.
    """
    wanted, position = run.config.train.prompts_per_step, stream.state()
    prompts = stream.take(wanted)
    if run.data.demonstrations:
        return StepGroups(tuple(run.data.demonstrations[prompt.problem.id] for prompt in prompts))
    kept, dropped = list[RewardedGroup](), list[RewardedGroup]()
    seen: set[str] = set()
    rewards: list[Reward] = []  # of the step so far: a refill may be a single group, and its rewards all missing
    refills, rollout_seconds, reward_seconds = 0, 0.0, 0.0
    try:
        while prompts:
            seen |= {prompt.problem.id for prompt in prompts}
            began = time.perf_counter()
            groups = roll_out(run, prompts, settings, tick)
            rolled = time.perf_counter()
            run.tell("progressed", "reward", 0, 0)
            for item in reward(run, groups):
                (kept if run.keep(item) else dropped).append(item)
                rewards += item.rewards
            require_some(rewards)
            rollout_seconds += rolled - began
            reward_seconds += time.perf_counter() - rolled
            if len(kept) == wanted or refills == run.config.filter.max_refills:
                break
            prompts = fresh_prompts(stream.take, wanted - len(kept), seen, len(run.data.train))
            refills += bool(prompts)
    except Interrupted:
        stream.restore(position)
        raise
    if len(kept) < wanted:
        run.note(
            f"step {settings.step} trains on {len(kept)} of {wanted} groups: filter '{run.config.filter.name}' "
            f"dropped {len(dropped)}, after {refills} refills"
        )
    return StepGroups(tuple(kept), tuple(dropped), refills, rollout_seconds, reward_seconds)


def roll_out(run: Run, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None]) -> list[Group]:
    """The prompts' groups, in their order. Each rank generates a share; workers elsewhere are asked by the first rank."""
    mine = (prompts if run.ranks.first else []) if run.remote else run.ranks.share(prompts)
    groups: list[Group] = []
    for group in run.rollouts.run(mine, settings, tick):
        groups.append(group)
        run.tell("progressed", "rollout", len(groups), len(mine))
    return exchanged(run.ranks, prompts, groups)


def exchanged(ranks: Ranks, prompts: Sequence[Prompt], mine: Sequence[Group]) -> list[Group]:
    """The groups of all ranks, in every rank, in the order of the prompts. They travel as record batches, each once."""
    if ranks.world > 1:
        named = {prompt.problem.id: prompt for prompt in prompts}
        sent = ranks.gather_bytes(to_ipc(encode([group]) for group in mine) if mine else b"")
        others = [body for rank, body in enumerate(sent) if body and rank != ranks.rank]
        batches = itertools.chain(*map(from_ipc, others))
        mine = [*mine, *(item.group for b in batches for item in decode(b, lambda row: named[row.problem_id]))]
    found = {group.prompt.problem.id: group for group in mine}
    return [found[prompt.problem.id] for prompt in prompts]


def reward(run: Run, groups: Sequence[Group]) -> list[RewardedGroup]:
    """The groups with their rewards. Each rank rewards a share, so a random reward is the same in all ranks."""
    trajectories = [t for g in groups for t in g.trajectories]
    texts = [run.policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in trajectories]
    following = iter(run.ranks.merge(run.scorer.score(run.ranks.share(trajectories), run.ranks.share(texts))))
    return [RewardedGroup(g, tuple(next(following) for _ in g.trajectories)) for g in groups]


class Prefetch:
    """Collects the next step's groups in a thread (`rollout.ahead`), by a copy of the weights that nobody changes meanwhile.

    A stop that is asked for waits for it: what was begun belongs to the state of the run.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: Future[StepGroups] | None = None

    def start(self, make: Callable[[], StepGroups]) -> None:
        """Begin to collect."""
        self._coming = self._thread.submit(make)

    def wait(self) -> StepGroups | None:
        """What was started, when it is there; None where nothing was. Only the time spent waiting counts as rollout time."""
        if self._coming is None:
            return None
        began = time.perf_counter()
        groups, self._coming = self._coming.result(), None
        return replace(groups, rollout_seconds=time.perf_counter() - began, reward_seconds=0.0)

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def pack_groups(groups: StepGroups) -> tuple[dict[str, Any], bytes]:
    """The groups for a checkpoint: the facts as JSON values, and what was generated as an Arrow IPC stream."""
    facts = {
        "kept": len(groups.kept),
        "refills": groups.refills,
        "seconds": [groups.rollout_seconds, groups.reward_seconds],
    }
    return facts, to_ipc([encode(groups.all)])


def unpack_groups(run: Run, facts: Mapping[str, Any], content: bytes) -> StepGroups:
    """The groups that `pack_groups` was given."""
    try:
        batches = from_ipc(content)
    except ValueError:
        raise UserError(
            f"the newest checkpoint of {run.path} holds prefetched rollouts in the format of an earlier version: "
            "continue the run with that version, or start it under another name"
        ) from None
    prompts = {prompt.problem.id: prompt for prompt in run.data.train}
    found = [g for batch in batches for g in decode(batch, lambda row: prompts[row.problem_id])]
    kept, dropped = tuple(found[: facts["kept"]]), tuple(found[facts["kept"] :])
    return StepGroups(kept, dropped, facts["refills"], *facts["seconds"])
