"""Writes docs/run-directory.md from the definitions of the file formats. With --check: fails where the page is stale."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa

from e3rl.train.ledger import SCHEMA
from e3rl.train.metrics import METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "run-directory.md"

HEAD = """# What a run directory holds

Written by `python tools/run_directory_page.py`; do not edit.

| file | content |
| --- | --- |
| `config.toml` | the resolved recipe: every setting of the run |
| `environment.json` | versions, machine and commit |
| `metrics.jsonl` | one line a step, below |
| `evaluations.jsonl` | one line an evaluation: step, mode, `data` (of several sources), Avg@k, Pass@k, intervals, tokens |
| `rollouts/step-NNNNNN.parquet` | every trajectory of the step and all that was erased on the way, below |
| `checkpoints/step-NNNNNN/` | a model for `from_pretrained`; optimizer, random state, position, statistics, prefetched rollouts |
| `journal/step-NNNNNN.journal` | candidates of steps that no checkpoint holds yet, each as soon as it is generated |
| `skipped/step-NNNNNN/` | a step that was skipped because of NaN or exploding numbers: finding, batch, weights (`e3rl replay`) |
| `model/` | the trained model as an ordinary Hugging Face directory, written at the end; LoRA adapters merged |
| `adapter/` | with LoRA: the adapters alone, as PEFT and vLLM load them |
| `summary.json` | before and after, r, erase rate, steps, seconds, tokens; written at the end |
| `report.html` | the run as a page that opens from disk |
"""


def _rows(fields: pa.Schema | pa.StructType, prefix: str = "") -> list[str]:
    rows = []
    for field in fields:
        kind, nested = field.type, None
        if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
            nested, shown = kind.value_type, "list of"
        else:
            shown = str(kind).replace("element: ", "").replace("item: ", "")
        meaning = (field.metadata or {}).get(b"meaning", b"").decode()
        rows.append(f"| `{prefix}{field.name}` | {shown} | {meaning} |")
        if nested is not None:
            rows += _rows(nested, f"{prefix}{field.name}.")
    return rows


def page() -> str:
    metrics = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in METRICS.items())
    columns = "\n".join(_rows(SCHEMA))
    return (
        f"{HEAD}\n## metrics.jsonl\n\nNumbers that do not exist in a step are null or absent; objectives may add their own "
        f"after a `/`. The last key, `crc32`, is\nthe checksum of the line before it; evaluations.jsonl has it too.\n\n"
        f"| key | meaning |\n| --- | --- |\n{metrics}\n\n"
        "## rollouts\n\nOne row a trajectory. pandas and DuckDB read the files without e3rl. Journals, prefetched rollouts "
        "(`prefetched.arrow`) and a skipped\nstep's batch (`batch.arrow`) hold the same rows, but for the text and what was "
        "learnt; so do the answers of rollout workers.\n\n"
        f"| column | type | meaning |\n| --- | --- | --- |\n{columns}\n"
    )


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else f"{PAGE} is stale: python {sys.argv[0]}")
    PAGE.write_text(page(), encoding="utf-8")
