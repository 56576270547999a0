"""Counts the shape of the package: how much there is to read, and how deep a step is.

python tools/house.py                       this checkout
python tools/house.py OLDER NEWER --json    several checkouts side by side, as JSON

What can be read off the files is read off them; what a step passes through is seen by running one step of the demo in each
checkout (a minute at most; `--static` leaves that out). Tests and research code do not count.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

STEPS = {"train/loop.py:step", "train/trainer.py:_one_step"}
"""The function that is one training step, in the layouts that there have been."""

ASIDE = ("report/", "train/display.py")
"""What is told of a step and may be slow or not be there: it does not count."""

DEMO = ("train.steps=1", "eval.limit=1", "eval.num_samples=1", "rollout.max_segments=2", "rollout.num_generations=2")


def modules(root: Path) -> dict[str, Path]:
    """The package's modules by name."""
    paths = sorted((root / "e3rl").rglob("*.py"))
    paths = [p for p in paths if "reproduce" not in p.relative_to(root).parts]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def importers(trees: dict[str, ast.Module]) -> Counter[str]:
    """How many modules import each, wherever in the file; a table of names counts as an import."""
    found: Counter[str] = Counter()
    for name, tree in trees.items():
        used: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & trees.keys()
                used |= inner or {node.module}
            elif isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value.partition(":")[0])
        found.update((used & trees.keys()) - {name})
    return found


def read(root: Path) -> dict[str, int | float]:
    """What the files show."""
    paths = modules(root)
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in paths.items()}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = Counter(n.name for n in nodes if isinstance(n, ast.ClassDef))
    rooms = Counter(
        str(path.relative_to(root / "e3rl").parts[0]) for path in paths.values() if path.parent.name != "e3rl"
    )
    used = importers(trees)
    alone = {name for name, path in paths.items() if path.name != "__init__.py" and used[name] == 1}
    return {
        "files": len(paths),
        "lines": sum(lines.values()),
        "median file": statistics.median(lines.values()),
        "longest file": max(lines.values()),
        "functions over 50 lines": sum((n.end_lineno or 0) - n.lineno + 1 > 50 for n in functions),
        "files in the largest room": max(rooms.values()),
        "modules with one importer": len(alone),
        "of these below 60 lines": sum(lines[name] < 60 for name in alone),
        "class names with several meanings": sum(n > 1 for n in classes.values()),
    }


def carries_tokens(value: Any) -> bool:
    """Whether a value of one of our types holds tokens, numbers of tokens, or values that do."""
    import numpy as np
    import torch

    if not type(value).__module__.startswith("e3rl.") or isinstance(value, type):
        return False
    names = (
        [f.name for f in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else getattr(value, "_fields", ())
    )
    for field in (getattr(value, name, None) for name in names):
        first = field[0] if isinstance(field, list | tuple) and field else field
        if isinstance(first, np.ndarray | torch.Tensor) or (type(first) is int and first is not field):
            return True
        if carries_tokens(first):
            return True
    return False


def watch(root: Path) -> dict[str, int]:
    """Run a step of the demo from this checkout and count what it passes through. For a process of its own."""
    import tempfile
    import threading
    from types import FrameType

    sys.path.insert(0, str(root))
    package = f"{root / 'e3rl'}{os.sep}"
    depths: set[int] = set()
    files: set[str] = set()
    types: set[type] = set()

    def seen(frame: FrameType | None, event: str, value: Any) -> None:
        if event not in ("call", "return") or frame is None or not frame.f_code.co_filename.startswith(package):
            return
        stack = []
        inner: FrameType | None = frame
        while inner is not None:
            if inner.f_code.co_filename.startswith(package):
                stack.append(f"{inner.f_code.co_filename[len(package) :]}:{inner.f_code.co_name}")
            inner = inner.f_back
        step = next((depth for depth, place in enumerate(stack) if place in STEPS), None)
        if step is None or any(place.startswith(ASIDE) for place in stack):
            return
        files.add(frame.f_code.co_filename)
        if event == "return" and carries_tokens(value):
            types.add(type(value))
        if frame.f_code.co_name == "_forward" and any(place.endswith(":poll") for place in stack):
            depths.add(step)

    from e3rl.cli.main import main as e3rl

    with tempfile.TemporaryDirectory() as directory:
        threading.setprofile(seen)
        sys.setprofile(seen)
        e3rl(["train", "demo", *DEMO, f"run.output_dir={directory}"])
        sys.setprofile(None)
    return {
        "frames from the step to the forward pass": min(depths),
        "files that a step runs through": len(files),
        "types of ours that carry tokens through a step": len(types),
    }


def counted(root: Path, *, static: bool) -> dict[str, int | float]:
    """Everything about one checkout."""
    found = read(root)
    if not static:
        command = [sys.executable, __file__, "--watch", str(root)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(f"house: a step of the demo failed in {root}:\n{done.stderr[-2000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def table(columns: dict[str, dict[str, int | float]]) -> str:
    """The counts as Markdown, a column a checkout."""
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for key in next(iter(columns.values())):
        lines.append(f"| {key} | {' | '.join(f'{column[key]:,g}' for column in columns.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--static", action="store_true", help="run nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        print(json.dumps(watch(options.watch.resolve())))
        return
    columns = {str(root): counted(root.resolve(), static=options.static) for root in options.checkouts}
    print(json.dumps(columns, indent=2) if options.json else table(columns))


if __name__ == "__main__":
    main()
