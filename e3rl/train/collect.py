"""From prompts to rewarded groups: a step's training data, collected when the step begins or before (`rollout.staleness`)."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from e3rl.cluster.ranks import Ranks
from e3rl.data.stream import Stream, epochs_at
from e3rl.environments.protocol import settled
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
    """A step's rewarded groups: those to train on, those that the filter dropped, and what collecting them took.

    ``position`` is where the prompt stream stood after them.
    """

    kept: tuple[RewardedGroup, ...]
    dropped: tuple[RewardedGroup, ...] = ()
    refills: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0
    position: Mapping[str, Any] = field(default_factory=dict)

    def whole(self) -> StepGroups:
        """Itself: all groups are there."""
        return self

    @property
    def epochs(self) -> float:
        """Passes over the prompts up to here."""
        return epochs_at(self.position)

    @property
    def all(self) -> tuple[RewardedGroup, ...]:
        """Kept groups first, so that a position in ``kept`` is the same position here."""
        return self.kept + self.dropped

    @property
    def dropped_tokens(self) -> int:
        """Tokens generated for groups that the filter dropped."""
        return summarise(item.group for item in self.dropped).generated_tokens


Show = Callable[[list[RewardedGroup]], None]


def collect(
    run: Run, stream: Stream, settings: GroupSettings, tick: Callable[[], None], show: Show | None = None
) -> StepGroups:
    """Groups of different prompts until enough pass the filter, refills are spent or prompts run out.

    A refill asks for as many groups as are missing, so no group that passes is thrown away. ``tick`` is called often and
    may raise `Interrupted`: then the stream is where it was. With ``show`` groups are rewarded as they finish and shown if
    they pass; they are then in that order, the same in all ranks.
    """
    wanted, position = run.config.train.prompts_per_step, stream.state()
    prompts = stream.take(wanted)
    if run.data.demonstrations:
        shown = tuple(run.data.demonstrations[prompt.problem.id] for prompt in prompts)
        return StepGroups(shown, position=stream.state())
    kept, dropped = list[RewardedGroup](), list[RewardedGroup]()
    seen: set[str] = set()
    rewards: list[Reward] = []  # of the whole step: a refill may be a single group whose rewards are all missing
    refills, rollout_seconds, reward_seconds = 0, 0.0, 0.0
    try:
        while prompts:
            seen |= {prompt.problem.id for prompt in prompts}
            began = time.perf_counter()
            for groups in roll_out(run, prompts, settings, tick, one_by_one=show is not None):
                rolled = time.perf_counter()
                run.tell("progressed", "reward", 0, 0)
                new = reward(run, groups)
                rewards += [value for item in new for value in item.rewards]
                passing = [run.keep(item) for item in new]
                kept += itertools.compress(new, passing)
                dropped += [item for item, passes in zip(new, passing, strict=True) if not passes]
                if show is not None:
                    show([*itertools.compress(new, passing)])
                rollout_seconds += rolled - began
                began = time.perf_counter()
                reward_seconds += began - rolled
            require_some(rewards)
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
    return StepGroups(tuple(kept), tuple(dropped), refills, rollout_seconds, reward_seconds, stream.state())


def roll_out(
    run: Run, prompts: Sequence[Prompt], settings: GroupSettings, tick: Callable[[], None], *, one_by_one: bool = False
) -> Iterator[list[Group]]:
    """The prompts' groups, in their order, or ``one_by_one`` as they finish: of several ranks, one of each at a time.

    Each rank generates a share; workers elsewhere are asked by the first rank.
    """
    mine = (prompts if run.ranks.first else []) if run.remote else run.ranks.share(prompts)

    groups, done = run.rollouts.run(mine, settings, tick), 0
    if not one_by_one:
        made: list[Group] = []
        for group in groups:
            made.append(group)
            run.tell("progressed", "rollout", len(made), len(mine))
        yield exchanged(run.ranks, prompts, made)
        return
    each = run.ranks.world if run.remote else 1
    for few in in_rounds(run.ranks, prompts, groups, each):
        done += len(few)
        run.tell("progressed", "rollout", done, len(prompts))
        yield few


def in_rounds(ranks: Ranks, prompts: Sequence[Prompt], groups: Iterator[Group], each: int) -> Iterator[list[Group]]:
    """The groups of all ranks, in every rank, ``each`` of a rank's in a round; all ranks have the same rounds.

    A rank generates in another thread meanwhile: it goes on, and takes new weights, where groups are rewarded or others awaited.
    """
    made: SimpleQueue[Group | None] = SimpleQueue()
    ended = threading.Event()

    def generate() -> None:
        try:
            for group in groups:
                made.put(group)
                if ended.is_set():
                    return
        finally:
            made.put(None)

    with ThreadPoolExecutor(1, thread_name_prefix="rollout") as thread:
        going, coming = thread.submit(generate), iter(made.get, None)
        try:
            for _ in range(-(-len(prompts) // ranks.world)):
                mine = list(itertools.islice(coming, each))
                if len(mine) < each:  # no more come, or an error did
                    going.result()
                yield exchanged(ranks, prompts, mine)
            going.result()
        finally:
            ended.set()


def exchanged(ranks: Ranks, prompts: Sequence[Prompt], mine: Sequence[Group]) -> list[Group]:
    """These groups of all ranks, in every rank, in the order of the prompts. They travel as record batches, each once.

    Environments stay where they are: every rank has their outcomes.
    """
    if ranks.world > 1:
        mine = list(map(settled, mine))
        named = {prompt.problem.id: prompt for prompt in prompts}
        sent = ranks.gather_bytes(to_ipc(encode([group]) for group in mine) if mine else b"")
        others = [body for rank, body in enumerate(sent) if body and rank != ranks.rank]
        batches = itertools.chain(*map(from_ipc, others))
        mine = [*mine, *(item.group for b in batches for item in decode(b, lambda name, _: named[name]))]
    found = {group.prompt.problem.id: group for group in mine}
    return [found[prompt.problem.id] for prompt in prompts if prompt.problem.id in found]


def reward(run: Run, groups: Sequence[Group]) -> list[RewardedGroup]:
    """The groups with their rewards. Each rank rewards a share, so a random reward is the same in all ranks."""
    trajectories = [t for g in groups for t in g.trajectories]
    texts = [run.policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in trajectories]
    following = iter(run.ranks.merge(run.scorer.score(run.ranks.share(trajectories), run.ranks.share(texts))))
    return [RewardedGroup(g, tuple(next(following) for _ in g.trajectories)) for g in groups]


class Arriving:
    """A step that is being collected in another thread. Iterated once: each time over the groups that came since the last, or,
    where several ranks learn from them, over one round (`in_rounds`): their passes wait for each other.

    ``waited`` are the seconds that no group was there.
    """

    def __init__(self, begin: Callable[[Show], Future[StepGroups]], *, round_by_round: bool) -> None:
        self.waited, self._round_by_round = 0.0, round_by_round
        self._groups: SimpleQueue[list[RewardedGroup] | None] = SimpleQueue()  # None: no more come
        self.future = begin(self._groups.put)
        self.future.add_done_callback(lambda _: self._groups.put(None))

    def __iter__(self) -> Iterator[list[RewardedGroup]]:
        more = True
        while more:
            began = time.perf_counter()
            came = [self._groups.get()]
            self.waited += time.perf_counter() - began
            while came[-1] is not None and not self._round_by_round and not self._groups.empty():
                came.append(self._groups.get())
            more = came[-1] is not None
            if groups := [group for some in came if some is not None for group in some]:
                yield groups
        self.future.result()  # what stopped it, before ranks wait for each other

    def whole(self) -> StepGroups:
        """All groups, once they are there; raises what stopped them. Only the time spent waiting counts as rollout time."""
        began = time.perf_counter()
        found = self.future.result()
        self.waited += time.perf_counter() - began
        return replace(found, rollout_seconds=self.waited, reward_seconds=0.0)


class Prefetch:
    """Collects the groups of coming steps, one step after the other, in a thread beside the training.

    They are generated by a copy of the weights, which changes only between two segments (`e3rl.cluster.rollouts`). This
    thread's exchanges between ranks use a process group of their own, so that it and training never wait for each other.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: deque[Arriving] = deque()
        self._closed = False

    def __len__(self) -> int:
        """Steps that were begun and not yet handed over."""
        return len(self._coming)

    def start(self, run: Run, stream: Stream, settings: GroupSettings) -> None:
        """Begin to collect a step, after those begun before. No other caller may take from ``stream`` meanwhile."""
        apart, streamed = replace(run, ranks=self._ranks), streams(run)

        def begin(show: Show) -> Future[StepGroups]:
            return self._thread.submit(collect, apart, stream, settings, self._check, show if streamed else None)

        self._coming.append(Arriving(begin, round_by_round=self._ranks.world > 1))

    def _check(self) -> None:
        if self._closed:
            raise Interrupted

    def next(self) -> Arriving:
        """The first step that was begun."""
        return self._coming.popleft()

    def wait(self) -> list[StepGroups]:
        """The groups of all steps that were begun."""
        return [self.next().whole() for _ in range(len(self._coming))]

    def finished(self, ranks: Ranks) -> list[StepGroups]:
        """Those of the steps that are complete by now, in all ``ranks``, which exchange in this thread."""
        done = sum(1 for _ in itertools.takewhile(lambda step: step.future.done(), self._coming))
        return [self.next().whole() for _ in range(min(ranks.gather(done)))]

    def close(self) -> None:
        """Stop collecting and end the thread."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)


def streams(run: Run) -> bool:
    """Whether groups of a coming step are learnt from before its last one is there. With ``rollout.staleness`` 1 updates wait for
    whole steps, so that a run can be repeated."""
    return run.config.rollout.staleness > 1 and run.learner.streams


def pack_groups(steps: Sequence[StepGroups]) -> tuple[list[dict[str, Any]], bytes]:
    """Steps' groups for a checkpoint: the facts as JSON values, and what was generated as an Arrow IPC stream."""
    facts = [
        {
            "kept": len(groups.kept),
            "refills": groups.refills,
            "seconds": [groups.rollout_seconds, groups.reward_seconds],
            "position": groups.position,
        }
        for groups in steps
    ]
    return facts, to_ipc(encode(groups.all) for groups in steps) if steps else b""


def unpack_groups(run: Run, facts: Sequence[Mapping[str, Any]], content: bytes) -> list[StepGroups]:
    """The steps' groups that `pack_groups` was given; UserError for those of another version."""
    prompts, steps = {prompt.problem.id: prompt for prompt in run.data.train}, []
    try:
        for fact, batch in zip(facts, from_ipc(content) if facts else [], strict=True):
            found = decode(batch, lambda name, _: prompts[name])
            kept, dropped = tuple(found[: fact["kept"]]), tuple(found[fact["kept"] :])
            rollout, rewards = fact["seconds"]
            steps.append(StepGroups(kept, dropped, fact["refills"], rollout, rewards, fact["position"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the newest checkpoint of {run.path} holds prefetched rollouts in the format of an earlier version ({error}): "
            "continue the run with that version, or start it under another name"
        ) from None
    return steps
