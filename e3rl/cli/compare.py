"""`e3rl compare`: two evaluations on the same problems, and whether their difference may be chance."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="directory of an evaluation (e3rl eval … --output DIR)")
    parser.add_argument("b", type=Path, help="directory of another one, on the same problems")
    parser.add_argument("--mode", default="plain", choices=("plain", "erasable"), help="decoding of A (default plain)")
    parser.add_argument("--mode-b", choices=("plain", "erasable"), help="decoding of B; default: as A")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from e3rl.evaluate.compare import compare, comparison_table

    modes = (options.mode, options.mode_b or options.mode)
    found = compare(options.a, options.b, modes)
    if options.json:
        print(json.dumps({name: asdict(row) for name, row in found.items()}, indent=2))
    else:
        Console().print(comparison_table(f"{options.a} ({modes[0]}) minus {options.b} ({modes[1]})", found))
    return 0
