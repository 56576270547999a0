"""The page: one HTML file with its styles, scripts and data inside. It opens from disk and loads nothing."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from itertools import starmap
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.report.embed import (
    content_security_policy,
    data_element,
    packed_element,
    script_element,
    sleeping_script_element,
    to_json,
)
from e3rl.report.overview import read_overview
from e3rl.report.rollouts import Selection, encode_group, select
from e3rl.types import TERMS, Trajectory

RUN_SCRIPTS = (
    "dom.js",
    "charts.js",
    "tokens.js",
    "turns.js",
    "rollout.js",
    "list.js",
    "overview.js",
    "same_problem.js",
    "compare.js",
    "source.js",
    "main.js",
)
TOKEN_SCRIPTS = ("dom.js", "tokens.js", "turns.js", "rollout.js", "token_view.js")

DATA_BUDGET = 16_000_000
"""Bytes of data in a page: some 20,000 short rollouts. With Plotly, which takes 4.8 MB, a page stays below 22 MB."""


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run directory and return its path. Safe to call while the run is in progress."""
    path = run / "report.html"
    described, selection = describe_run(run)
    data = {"run": to_json({"live": False, "runs": [described]})}
    packed = {f"rollouts-0-{step.step}": step.packed for step in selection.steps}
    write_text(path, render_page(f"{run.name} · E³RL", RUN_SCRIPTS, data, packed, charts=True))
    return path


def describe_run(run: Path) -> tuple[dict[str, Any], Selection]:
    """A run as the page's data, and the rollouts that fit into the page."""
    try:
        overview = read_overview(run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # logs that parse but have other contents
        raise UserError(f"the logs of {run} are damaged ({error!r}): 'e3rl doctor {run}' says where") from error
    room = DATA_BUDGET - len(to_json(overview).encode())
    selection = select(run, room // 1_000_000 * 1_000_000)  # whole megabytes, so that the cache stays valid
    described = {
        **overview,
        "directory": run.resolve().name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "graded": overview["graded"] or any(step.answered for step in selection.steps),
        "index": selection.index(),
        "rollouts": {
            "shown": sum(len(step.index) for step in selection.steps),
            "total": selection.total,
            "first_step": selection.steps[0].step if selection.steps else None,
        },
    }
    return described, selection


def render_page(
    title: str, scripts: Sequence[str], data: Mapping[str, str], packed: Mapping[str, str] = {}, *, charts: bool
) -> str:
    """A whole page. ``data`` holds `to_json` texts by the id that the scripts find them under, ``packed`` packed ones."""
    terms = f"const TERMS = {to_json(list(TERMS.values()))};"
    code = "\n".join(["(() => {", '"use strict";', terms, *(_asset(name) for name in scripts), "})();"])
    library = [_plotly()] if charts else []
    parts = {
        "policy": content_security_policy([code, *library]),
        "title": title.translate({ord("<"): "&lt;", ord("&"): "&amp;"}),
        "style": _asset("report.css"),
        "data": "\n".join([*starmap(data_element, data.items()), *starmap(packed_element, packed.items())]),
        "scripts": "\n".join([*(sleeping_script_element("plotly", c) for c in library), script_element(code)]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("template.html"))


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("e3rl.report") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def write_token_view(path: Path, trajectories: Sequence[Trajectory], tokenizer: Any) -> Path:
    """Write the page that shows responses to one prompt and return its path. It needs no network and no run."""
    write_text(path, token_view(trajectories, tokenizer))
    return path


def token_view(trajectories: Sequence[Trajectory], tokenizer: Any) -> str:
    """The page itself."""
    from e3rl.data.pieces import Pieces
    from e3rl.train.ledger import response_columns

    pieces = Pieces(tokenizer)
    unlearnt = {"advantages": None, "shares": None, "erased_advantages": ()}
    unrewarded = {"reward": None, "reward_parts": None, "reward_error": None, **unlearnt}
    rows = [{"problem_id": t.prompt.problem.id, **response_columns(t, pieces), **unrewarded} for t in trajectories]
    return render_page("Decoded · E³RL", TOKEN_SCRIPTS, {"group": to_json(encode_group(rows))}, charts=False)
