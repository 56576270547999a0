"""What the browser tests do with a page again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from e3rl.report.server import make_server
from e3rl.web.access import Access
from tests.report.builder import SyntheticRun
from tests.web.running import running

RESPONSE_TOKEN = ".segment > .tokens .token"


@contextmanager
def serving(page: Any, *runs: Path) -> Iterator[str]:
    """The runs' address; the page leaves it before the server ends, for a live page that is left alone complains."""
    with running(make_server(runs, Access("127.0.0.1"), 0)) as server:
        try:
            yield f"{server.url}/"
        finally:
            page.goto("about:blank")


def rows_of(run: SyntheticRun, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.path / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
    return rows


def open_view(page: Any, address: str, view: str) -> None:
    page.goto(address)
    page.get_by_role("button", name=view, exact=True).click()


def choose(page: Any, control: str, value: str) -> None:
    page.get_by_role("combobox", name=control, exact=True).select_option(value)


def report(run: SyntheticRun) -> str:
    return (run.path / "report.html").as_uri()
