"""Training workers on Ray: started, watched, replaced. Each is a rank and runs what torchrun's processes run.

The others wait for a lost rank and can't go on, so all start again from the newest checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e3rl import __version__
from e3rl.cluster.ranks import OtherRankGone
from e3rl.cluster.ray_cluster import SECONDS_TO_START, Head, join_cluster, last_line, resources, wait_for
from e3rl.cluster.training_worker import Begin, Job, News, Outcome, TrainingWorker
from e3rl.config import Config
from e3rl.errors import RunStopped, UserError
from e3rl.train.listeners import Interrupted, Listener, StopRequest

LOSSES = 3
"""Losses in a row, with no new step between them, after which the run ends."""

_POLL = 0.5
_SECONDS_TO_ANSWER = 60.0  # for a rank's threads beside its training; loading a library may hold them up
_SECONDS_TO_FALL = 10.0  # after a rank is lost, for the others to notice and say why
_SECONDS_TO_END = 10.0


class RankLost(Exception):
    """A failure in a rank that another start may not meet again."""


class RankDied(RankLost):
    """A rank's process is gone."""


def train_on_ray(config: Config, job: Job, begin: Begin, listener: Listener) -> Outcome:
    """Do a job in ``train.workers`` ranks on Ray, and from the newest checkpoint again when one of them is lost."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise UserError("torchrun started this process, and train.workers starts ranks of its own: choose one of them")
    ray = join_cluster(config)
    head, watched = Head(ray), _Progress(listener)
    losses: list[str] = []
    with StopRequest() as stop:
        while True:
            before = watched.step
            crew = _Crew(ray, head, config)
            try:
                return crew.train(job, begin, watched, stop)
            except RankLost as lost:
                losses = [*(losses if watched.step == before else []), str(lost)]
                crew.see_ended()
            finally:
                crew.close()
            if len(losses) >= LOSSES:
                raise UserError(
                    f"training workers were lost {LOSSES} times with no new step between: {'; '.join(losses)}"
                    + (f". Everything up to the newest checkpoint is in {watched.run}" if watched.run else "")
                )
            watched.noted(f"{losses[-1]}; all training workers begin again, from the newest checkpoint")
            begin = Begin(resume=True) if watched.run else begin


class _Progress:
    """Passes on what the first rank tells, and knows the run's directory and the furthest step that was done."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.run: Path | None = None
        self.step = 0

    def hear(self, told: Sequence[News]) -> None:
        for event, values in told:
            if event == "started":
                self.run = values[0]
            elif event == "stepped":
                self.step = max(self.step, values[0]["step"])
            getattr(self._listener, event)(*values)

    def noted(self, text: str) -> None:
        self._listener.noted(text)


class _Crew:
    """The actors of one attempt, placed together: Ray reserves room for all of them or for none, on as few machines as it can."""

    def __init__(self, ray: Any, head: Head, config: Config) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Within

        self._ray, self._head = ray, head
        train = config.train
        needs = {"CPU": 1.0, **({"GPU": train.worker_gpus} if train.worker_gpus else {})}
        self._room = ray.util.placement_group([needs] * train.workers, strategy="PACK")
        actor = ray.remote(TrainingWorker)
        options = {"num_cpus": 1, "num_gpus": train.worker_gpus, "max_restarts": 0, "max_concurrency": 4}
        self._actors = [
            actor.options(**options, scheduling_strategy=Within(self._room, rank)).remote()
            for rank in range(train.workers)
        ]

    def train(self, job: Job, begin: Begin, watched: _Progress, stop: StopRequest) -> Outcome:
        """Until all ranks are done, or one of them failed."""
        meeting = self._meeting()
        calls = {
            actor.train.remote(job, begin, {"RANK": str(rank), **meeting}, os.getcwd()): rank
            for rank, actor in enumerate(self._actors)
        }
        asked, outcomes = False, dict[int, Any]()
        while len(outcomes) < len(calls):
            asked = asked or self._pass_on(stop)
            if 0 not in outcomes:
                watched.hear(self._told(_POLL))
            outcomes |= self._finished(calls, outcomes)
            if any(_failed(outcome) for outcome in outcomes.values()):
                break
            self._head.check()
        watched.hear(self._told(0))
        self._finish_falling(calls, outcomes)
        return _result(outcomes)

    def _meeting(self) -> dict[str, str]:
        """Where the ranks meet, once all of them are there and are of this version."""
        hellos = [self._call(rank, actor.hello.remote(), SECONDS_TO_START) for rank, actor in enumerate(self._actors)]
        for rank, (version, address, _) in enumerate(hellos):
            if version != __version__:
                raise UserError(
                    f"training worker {rank}, on {address}, runs e3rl {version}, and this process {__version__}: install the "
                    "same version on all machines of the cluster"
                )
        _, address, port = hellos[0]
        world = str(len(self._actors))
        return {"WORLD_SIZE": world, "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def _call(self, rank: int, reference: Any, seconds: float) -> Any:
        try:
            return wait_for(self._ray, self._head, reference, seconds)
        except self._ray.exceptions.GetTimeoutError:
            raise RankLost(
                f"training worker {rank} did not answer within {seconds:g} s; Ray has {resources(self._ray)}"
            ) from None
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError | RunStopped) and not isinstance(cause, OtherRankGone):
                raise cause from None
            kind = RankDied if isinstance(error, self._ray.exceptions.RayActorError) else RankLost
            raise kind(f"training worker {rank} is lost: {last_line(error)}") from None

    def _told(self, seconds: float) -> list[News]:
        """New events of rank 0; none where it is gone, which the end of its training reports."""
        try:
            told: list[Any] = self._call(0, self._actors[0].told.remote(seconds), _SECONDS_TO_ANSWER)
        except RankLost:
            time.sleep(seconds)
            return []
        return told

    def _pass_on(self, stop: StopRequest) -> bool:
        """Tell the ranks that a stop was asked for, if it was."""
        try:
            stop.check()
        except Interrupted:
            for actor in self._actors:
                actor.stop.remote()
            return True
        return False

    def _finished(self, calls: Mapping[Any, int], known: Mapping[int, Any]) -> dict[int, Any]:
        """Ranks that have ended since the last call: their outcome or error."""
        running = [call for call, rank in calls.items() if rank not in known]
        done, _ = self._ray.wait(running, num_returns=len(running), timeout=0) if running else ([], [])
        found: dict[int, Any] = {}
        for call in done:
            try:
                found[calls[call]] = self._call(calls[call], call, _SECONDS_TO_ANSWER)
            except RankLost as lost:
                found[calls[call]] = lost
            except (UserError, RunStopped) as error:
                found[calls[call]] = error
        return found

    def _finish_falling(self, calls: Mapping[Any, int], outcomes: dict[int, Any]) -> None:
        """After a failure, wait for the other ranks' errors: one of them may hold the cause."""
        until = time.monotonic() + _SECONDS_TO_FALL
        while len(outcomes) < len(calls) and time.monotonic() < until:
            time.sleep(_POLL)
            outcomes |= self._finished(calls, outcomes)

    def see_ended(self) -> None:
        """Wait until the processes are gone: the next ones need their resources."""
        ends = [actor.end.remote() for actor in self._actors]
        self._ray.wait(ends, num_returns=len(ends), timeout=_SECONDS_TO_END)

    def close(self) -> None:
        """End the actors."""
        try:
            for actor in self._actors:
                self._ray.kill(actor)
            self._ray.util.remove_placement_group(self._room)
        except Exception:  # Ray is gone, and they with it
            return


def _failed(outcome: Any) -> bool:
    return isinstance(outcome, RankLost | UserError)


def _result(outcomes: Mapping[int, Any]) -> Outcome:
    """The first rank's outcome; or the error that says most: what a person can put right, a death, what others made of it."""
    errors = [outcome for _, outcome in sorted(outcomes.items()) if _failed(outcome)]
    for kind in (UserError, RankDied, RankLost):
        for error in errors:
            if isinstance(error, kind):
                raise error
    first = outcomes[0]
    if isinstance(first, RunStopped):
        raise first
    result: Outcome = first
    return result
