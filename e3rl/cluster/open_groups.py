"""The groups of one batch of rollouts while workers make them: waiting, at a worker, delivered."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from e3rl.errors import UserError
from e3rl.types import Group, Prompt


class OpenGroups:
    """The groups of one call: waiting, at a worker, delivered. Every method may be called from any thread."""

    def __init__(self, prompts: Sequence[Prompt], seats: int) -> None:
        self._prompts = {prompt.problem.id: prompt for prompt in prompts}
        if len(self._prompts) < len(prompts):
            raise UserError(
                "a problem id occurs twice in one batch of rollouts. Give every problem its own (data.id_column)"
            )
        self._waiting = deque(self._prompts)
        self._left = len(prompts)  # not yet handed to the caller
        self._open = set(self._prompts)
        self._ready: list[Group] = []
        self._seats, self._reasons = seats, list[str]()
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def all_delivered(self) -> bool:
        return self._left == 0

    @property
    def over(self) -> bool:
        """Whether nothing is left for workers to do."""
        return self._stopped or not self._open or self._error is not None

    def take(self, room: int) -> list[Prompt]:
        """Some waiting groups: at most a fair share, so that few groups are spread over all workers."""
        with self._changed:
            share = -(-len(self._waiting) // max(1, self._seats))
            return [self._prompts[self._waiting.popleft()] for _ in range(min(room, share))]

    def put_back(self, ids: Sequence[str]) -> None:
        """Make groups available again that their worker will not finish."""
        with self._changed:
            self._waiting.extendleft(i for i in reversed(ids) if i in self._open)
            self._changed.notify_all()

    def deliver(self, group: Group) -> None:
        """A finished group; a second result of the same group is dropped."""
        with self._changed:
            if group.prompt.problem.id in self._open:
                self._open.discard(group.prompt.problem.id)
                self._ready.append(group)
                self._changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Wait until there may be something to do."""
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._waiting, seconds)

    def pause(self, seconds: float) -> None:
        """Wait, unless the batch is over before."""
        with self._changed:
            self._changed.wait_for(lambda: self.over, seconds)

    def delivered(self, seconds: float) -> list[Group]:
        """Finished groups that the caller has not had; raises the batch's error."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error, seconds)
            if self._error is not None:
                raise self._error
            ready, self._ready = self._ready, []
            self._left -= len(ready)
            return ready

    def give_up(self, reason: str) -> None:
        """Remove a worker for good. The others do its work; the last one's end is an error."""
        with self._changed:
            self._seats -= 1
            self._reasons.append(reason)
            if self._seats == 0:
                self._error = UserError(f"no rollout worker is left ({'; '.join(self._reasons)})")
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
