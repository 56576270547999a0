"""A decoded response as a page of its own: what was generated, what was erased, and how sure the model was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e3rl.files import write_text
from e3rl.report.embed import to_json
from e3rl.report.page import TOKEN_SCRIPTS, render_page
from e3rl.report.rollouts import encode_group
from e3rl.types import Trajectory


def write_token_view(path: Path, trajectory: Trajectory, tokenizer: Any) -> Path:
    """Write the page that shows ``trajectory`` and return its path. It needs no network and no run directory."""
    write_text(path, token_view(trajectory, tokenizer))
    return path


def token_view(trajectory: Trajectory, tokenizer: Any) -> str:
    """The page itself."""
    from e3rl.train.ledger import response_columns
    from e3rl.train.pieces import Pieces

    unrewarded = {"reward": None, "reward_parts": None, "reward_error": None, "advantages": None, "shares": None}
    problem = trajectory.prompt.problem.id
    row = {"problem_id": problem, **response_columns(trajectory, Pieces(tokenizer)), **unrewarded}
    return render_page(f"{problem} · E³RL", TOKEN_SCRIPTS, {"group": to_json(encode_group([row]))}, charts=False)
