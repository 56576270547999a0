"""The rows of an engine that one group holds, a row a sibling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from e3rl.engine.protocol import Engine, Row
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.orders import Extend
from e3rl.types import Draw


class GroupRows:
    """Takes rows, brings each to the place where its next segment starts, and gives them back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._append = getattr(engine, "append", None)
        self._prompt_ids: Sequence[int] = ()
        self._rows: dict[int, Row] = {}  # by sibling
        self._offsets: dict[int, int] = {}  # response tokens that a sibling's row has as part of its prompt

    @property
    def held(self) -> list[Row]:
        """The rows that the group holds."""
        return list(self._rows.values())

    def take(self, prompt_ids: Sequence[int], siblings: Sequence[int]) -> None:
        """Prefill the prompt, once for all siblings."""
        self._prompt_ids = prompt_ids
        self._rows = dict(zip(siblings, self._engine.prefill(prompt_ids, len(siblings)), strict=True))

    def extend(
        self, order: Extend, draw: Draw, settings: GroupSettings, committed: Callable[[int], Sequence[int]]
    ) -> Row:
        """Open the request that the order asks for; the row that will deliver it.

        Tokens behind ``order.start`` are rolled back. Those that the row lacks before it (after `release_all` and `take`) are
        asked of ``committed``, which returns a sibling's committed tokens.
        """
        sibling, engine = order.sibling, self._engine
        row, offset = self._rows[sibling], self._offsets.get(sibling, 0)
        held = engine.length(row) + offset
        if held > order.start:
            engine.rollback(row, order.start - offset)
        elif held < order.start:
            row = self._take_up(sibling, committed(sibling), held)
        engine.extend(row, order.tokens, draw, settings.sampling, *settings.hooks[sibling : sibling + 1])
        return row

    def _take_up(self, sibling: int, ids: Sequence[int], held: int) -> Row:
        """Bring a row up to its sibling's committed ``ids``, of which it holds the first ``held``.

        On a CPU, an engine that can ``append`` then gives the numbers of an uninterrupted run, to the last bit. Any other
        engine gets prompt and tokens as one prompt.
        """
        row = self._rows[sibling]
        if self._append is not None:
            self._append(row, ids[held:])
            return row
        self._engine.release(self._rows.pop(sibling))
        [row] = self._engine.prefill([*self._prompt_ids, *ids], 1)
        self._rows[sibling], self._offsets[sibling] = row, len(ids)
        return row

    def release(self, sibling: int) -> None:
        """Give back the sibling's row, if it holds one."""
        if sibling in self._rows:
            self._engine.release(self._rows.pop(sibling))

    def release_all(self) -> None:
        """Give back every row, each even where another one's release fails."""
        rows, self._rows, self._offsets = self.held, {}, {}
        with contextlib.ExitStack() as releases:
            for row in rows:
                releases.callback(self._engine.release, row)
