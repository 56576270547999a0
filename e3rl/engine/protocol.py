"""The seam between deciding what to generate and generating it.

An engine is the only thing that knows about KV caches. The driver asks for candidates, says which tokens to drop and
does not see how either is done. `e3rl.testing` holds the contract suite that every engine must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

from e3rl.types import Candidate, Draw

if TYPE_CHECKING:
    from torch import Tensor

Row = NewType("Row", int)
"""Handle of one sequence inside an engine. Handles are never reused within an engine's life."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """Ends a candidate behind its first token, from its ``least``-th on, whose measure is above ``level``."""

    measure: str  # "surprise", −log p of the token, or "entropy" of what it was drawn from, in nats
    level: float
    least: int = 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the model's distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    entropy_distribution: str = "full"  # or "truncated"
    measured_at: float = 0.0  # temperature that entropy and perturbation are measured at; 0: the one that is drawn with
    min_p: float = 0.0  # least probability of a token beside the likeliest's, before top_k and top_p; 0 keeps all
    boundary: Boundary | None = None  # None: a candidate has all its tokens unless the sequence ends


LogitsHook = Callable[["Tensor", Sequence[int]], None]
"""Called before each token of a row is drawn, with the logits [V] that it is drawn from and the row's generated tokens so far.

It may change the logits in place: everything is drawn and measured from what it leaves. After a rollback it is called again
with fewer tokens. It must not raise, and a token that it forbids gets a large negative number, not infinity.
"""


class Engine(Protocol):
    """Generates candidates for many rows at once; rolls a row back to any earlier length at no cost."""

    def free_rows(self) -> int:
        """How many more rows `prefill` could create now."""

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        """Run a prompt through the model once and make ``siblings`` rows that all continue it.

        Raises UserError where the prompt is empty or prompt plus completion can never fit.
        """

    def length(self, row: Row) -> int:
        """Generated tokens that the row holds (prompt excluded)."""

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        """Ask for a candidate of up to ``tokens`` tokens at the row's end; `poll` will deliver it.

        A row has at most one open request. Candidates depend on the row's tokens, ``draw`` and ``sampling`` alone,
        never on what else is being generated.
        """

    def poll(self) -> list[tuple[Row, Candidate]]:
        """Generate until at least one request is complete; return all that are. Empty when nothing is open."""

    def rollback(self, row: Row, length: int) -> None:
        """Drop the row's generated tokens beyond ``length``. Costs nothing and recomputes nothing."""

    def release(self, row: Row) -> None:
        """Forget the row and free its memory."""

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take new policy weights. Only legal while no row is held: cached keys belong to the old weights."""


class InterruptibleEngine(Engine, Protocol):
    """An engine whose poll can be interrupted to submit or release something."""

    def interrupt(self) -> None:
        """Called by any thread: the poll in progress, or else the next one, returns after a step, with or without candidates."""


class ServingEngine(InterruptibleEngine, Protocol):
    """An engine that takes hooks and shows what is under way."""

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling, hook: LogitsHook | None = None) -> None:
        """As `Engine.extend`; ``hook`` sees the logits of every token of this candidate."""

    def poll(self, steps: int = 0) -> list[tuple[Row, Candidate]]:
        """As `Engine.poll`; with ``steps`` it also returns after at most so many tokens a row, with or without candidates."""

    def drawn(self, row: Row, after: int) -> tuple[list[int], list[float]]:
        """What the row's open request has drawn since its first ``after`` tokens: ids and log-probabilities."""


class RestingEngine(Engine, Protocol):
    """An engine that can leave its device to training."""

    def rest(self) -> None:
        """No group is under way: free what memory can be had back, until something is asked again."""


class AppendingEngine(Engine, Protocol):
    """An engine that can go on where another process left off. Without it, prompt and tokens are prefilled together."""

    def append(self, row: Row, ids: Sequence[int]) -> None:
        """Continue the row by tokens that were generated before, under the same weights; it has no open request."""
