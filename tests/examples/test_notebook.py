"""The notebook runs from top to bottom, and its cells say what they should."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(PATH, as_version=4)
    asyncio.set_event_loop(asyncio.new_event_loop())
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    done = nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
    return [cell for cell in done.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(o["text"] for o in cell.outputs if o.get("name") == "stdout")


def shown(cell: Any, kind: str) -> list[Any]:
    return [o["data"][kind] for o in cell.outputs if kind in o.get("data", {})]


def test_it_decodes_trains_and_plots(cells: list[Any]) -> None:
    assert re.search(r"A:\d+ after [1-9]\d* erasures", printed(cells[0]))
    assert "<del" in shown(cells[1], "text/html")[0]
    plots = [plot for cell in cells for plot in shown(cell, "application/vnd.plotly.v1+json")]
    assert [len(plot["data"]) for plot in plots] == [4, 3]
    assert len(plots[1]["data"][0]["x"]) == 6
    assert printed(cells[3]).count("Avg@4") == 4
    assert Path(printed(cells[5]).strip()).name == "report.html"
    assert re.search(r"right of 8: \d before, \d after 6 steps", printed(cells[-1]))


def test_the_notebook_is_kept_without_outputs() -> None:
    import json

    code = [c for c in json.loads(PATH.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
