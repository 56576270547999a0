"""What a run says at its end: the table of before and after, one erasure, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.text import Text

from e3rl.evaluate.tables import results_table


def telling_erasure(run: Path) -> Mapping[str, Any] | None:
    """An erasure worth showing: in a late, rewarded trajectory, the one furthest above its threshold."""
    for ledger in sorted((run / "rollouts").glob("step-*.parquet"), reverse=True):
        rows = pq.read_table(ledger, columns=["prompt", "reward", "segments", "erasures"]).to_pylist()
        found = [(e, row) for row in rows if (row["reward"] or 0) > 0 for e in row["erasures"]]
        if found:
            erasure, row = max(found, key=lambda pair: pair[0]["uncertainty"] / pair[0]["threshold"])
            return {"erasure": erasure, "row": row}
    return None


def erasure_text(example: Mapping[str, Any]) -> Text:
    """The prompt and prefix, the erased segment struck through, and what replaced it."""
    erasure, row = example["erasure"], example["row"]
    replaced = next(s for s in row["segments"] if s["index"] == erasure["index"])
    prefix = "".join(s["text"] for s in row["segments"] if s["index"] < erasure["index"])
    return Text.assemble(
        ("An erased segment and what replaced it\n", "bold"),
        (f"  prompt    {row['prompt']!r}\n", "dim"),
        f"  prefix    {prefix!r}\n",
        "  erased    ",
        (repr(erasure["text"]), "red strike"),
        f"  U {erasure['uncertainty']:.3f} above threshold {erasure['threshold']:.3f}\n",
        "  replaced  ",
        (repr(replaced["text"]), "green"),
        f"  U {replaced['uncertainty']:.3f}\n",
    )


def closing(run: Path, summary: Mapping[str, Any]) -> RenderableType:
    """Everything that is printed when a run is complete."""
    parts: list[RenderableType] = [Text("")]
    if summary["after"]:
        rows = [(f"{mode}, {when}", summary[when][mode]) for mode in summary["after"] for when in ("before", "after")]
        parts.append(results_table("Held-out problems", rows))
    example = telling_erasure(run)
    if example:
        parts.append(erasure_text(example))
    parts.append(
        Text(
            f"{summary['method']}, {summary['steps']} steps in {summary['train_seconds']:.0f} s: erase rate "
            f"{summary['erase_rate']:.3f}, r {summary['r']:.3f}, {summary['tokens_generated']} tokens generated\n"
            f"run     {run}\nmodel   {run / 'model'}\nreport  {run / 'report.html'}"
        )
    )
    return Group(*parts)
