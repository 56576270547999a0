"""Writes docs/paper-scale.md: what the papers state, the settings that follow, and what they leave open; ``--check`` compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from e3rl_reproduce.paper import Filled, Stated, filled, stated

PAGE = Path(__file__).parents[1] / "docs" / "paper-scale.md"

HEAD = """# The papers' scale

The recipes `qwen3-4b` and `qwen3-8b` are E³RL's (arXiv 2606.17735, appendix D), `erpo-qwen2.5-1.5b`, `-3b` and `-7b` are ERPO's
(section 4.1). Below is every number that the papers state, with its sentence, and then what they leave open. The page is written
from `e3rl_reproduce/stated.toml`; tests hold every method's resolved recipe to it, and `e3rl reproduce --scale paper` names what
a run's own settings change of it.
"""

TAIL = """## What the comparison can't give

- Eq 22's ratio is a product over up to 1,024 tokens: a drift of 0.001 a token clips 44 % of segments. Every run logs the clip
  fraction by segment; `objective.ratio = "segment_mean"` takes the root.
- Rows of table 2 change φ as well (eq 18 compares an entropy with a B_n that lacks a term): φ is in the ledger of every run.
- Pass@k here is the unbiased estimate from all samples; E³RL's table 6 was made from exactly k samples at each k.

## Machines

An overlay says where a recipe runs: `--overlay topologies/…`, also with `reproduce --scale paper`. `e3rl train RECIPE --overlay …
--plan` says whether it fits.

| overlay | GPUs | who does what |
| --- | --- | --- |
| `topologies/one-h200` | 1 × 139 GiB | one process generates and trains: Qwen3-4B, and ERPO's models |
| `topologies/8xh100` | 8 × 80 GiB | eight ranks generate and train together (FSDP2): Qwen3-4B and Qwen3-8B |
| `topologies/32xh100` | 32 × 80 GiB | 16 rollout workers with vLLM, 16 ranks under DeepSpeed's ZeRO-2, as in the paper |

The last two start their processes on Ray; `rollout.address` names a cluster that is there. Only their memory is counted: we have
run none of them.
"""


def _values(settings: Mapping[str, Any]) -> str:
    return "<br>".join(f"`{name} = {json.dumps(value, ensure_ascii=False)}`" for name, value in settings.items())


def _stated(entries: Iterable[Stated]) -> list[str]:
    rows = [f"| “{entry.quote}” | {_values(entry.settings)} | {entry.reading} |" for entry in entries]
    return ["| the paper | settings | read as |", "| --- | --- | --- |", *rows]


def _filled(entries: Iterable[Filled]) -> list[str]:
    rows = [f"| {_values(entry.settings)} | {entry.why} |" for entry in entries]
    return ["| settings | what is not stated, and why this |", "| --- | --- |", *rows]


def page() -> str:
    """The page as text."""
    lines = [HEAD]
    for part, name in (("e3rl", "E³RL"), ("erpo", "ERPO")):
        lines += [f"## {name}: stated", "", *_stated(stated(part)), ""]
        if part == "e3rl":
            lines += ["And of its machines, in `topologies/32xh100`:", "", *_stated(stated("topology")), ""]
        lines += [f"## {name}: filled in", "", *_filled(filled(part)), ""]
    return "\n".join([*lines, TAIL])


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` say whether it is fresh."""
    if "--check" not in arguments:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
    if not fresh:
        print("docs/paper-scale.md is stale: run python tools/paper_page.py", file=sys.stderr)
    return 0 if fresh else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
