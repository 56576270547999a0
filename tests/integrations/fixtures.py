"""Six scripts as people write them for TRL, with a model and data that they name, in a directory to run them in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from e3rl.lab.__init__ import lab_directory

SCRIPTS = Path(__file__).parent / "scripts"
NAMES = ("quickstart", "positional", "main_function", "mapped", "gspo", "rloo")
ROWS = [("3+4:", "7"), ("9-5:", "4"), ("2+6-1:", "7"), ("8-3+2:", "7")]


def lay_out(directory: Path) -> Path:
    """The scripts, ``model/`` and the data files."""
    shutil.copytree(SCRIPTS, directory, dirs_exist_ok=True)
    shutil.copytree(lab_directory(), directory / "model", ignore=shutil.ignore_patterns("e3rl*"))
    config = json.loads((directory / "model" / "config.json").read_text())
    config["max_position_embeddings"] = 1024  # TRL's default completions have 512 tokens
    (directory / "model" / "config.json").write_text(json.dumps(config))
    chat = [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in ROWS]
    files = {
        "chat": chat,
        "heldout": chat[:2],
        "plain": [{"prompt": q, "answer": a} for q, a in ROWS],
        "questions": [{"question": q, "answer": a} for q, a in ROWS],
    }
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
