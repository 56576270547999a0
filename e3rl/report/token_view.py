"""Decoded responses as a page of their own: what was generated, what was erased, and how sure the model was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e3rl.files import write_text
from e3rl.report.embed import to_json
from e3rl.report.page import TOKEN_SCRIPTS, render_page
from e3rl.report.rollouts import encode_group
from e3rl.types import Trajectory


def write_token_view(path: Path, trajectories: Sequence[Trajectory], tokenizer: Any) -> Path:
    """Write the page that shows responses to one prompt and return its path. It needs no network and no run."""
    write_text(path, token_view(trajectories, tokenizer))
    return path


def token_view(trajectories: Sequence[Trajectory], tokenizer: Any) -> str:
    """The page itself."""
    from e3rl.train.ledger import response_columns
    from e3rl.train.pieces import Pieces

    pieces = Pieces(tokenizer)
    unlearnt = {"advantages": None, "shares": None, "erased_advantages": ()}
    unrewarded = {"reward": None, "reward_parts": None, "reward_error": None, **unlearnt}
    rows = [{"problem_id": t.prompt.problem.id, **response_columns(t, pieces), **unrewarded} for t in trajectories]
    return render_page("Decoded · E³RL", TOKEN_SCRIPTS, {"group": to_json(encode_group(rows))}, charts=False)
