"""Errors for users: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from e3rl.types import Draw


class UserError(Exception):
    """An error that the user can fix. The command line prints only the message and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table: lists the known names and suggests the nearest."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return UserError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}.")


_OURS = Path(__file__).parent
_LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def where_raised(error: BaseException) -> str:
    """`` (file.py:12)``, the innermost line of the user's own code that an exception came through; empty where none is."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if _OURS not in Path(f.filename).parents and not any(x in f.filename for x in _LIBRARIES)]
    own = [f for f in own if not f.filename.startswith("<")]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


class NonFiniteLogits(UserError):
    """The model's output is NaN or infinite, so there is nothing to sample from. ``draw`` names the row."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        super().__init__(
            f"the model's logits are NaN or infinite for prompt '{draw.prompt_id}', sibling {draw.sibling}, segment "
            f"{draw.segment}, attempt {draw.attempt} of step {draw.step}: its weights are broken (look for a NaN loss "
            "or gradient just before) or overflow in the chosen dtype"
        )

    def __reduce__(self) -> tuple[type[NonFiniteLogits], tuple[Draw]]:
        """What pickling needs to carry the error out of a worker process."""
        return NonFiniteLogits, (self.draw,)


class RunStopped(Exception):
    """A run stopped on request, with its state saved; the message says how to continue."""
