"""`e3rl replay`: learn a skipped step again and see where its NaN comes from."""

from __future__ import annotations

import argparse
from pathlib import Path

from e3rl.cli.opening import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--step", type=int, help="the skipped step; by default the newest that is kept")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="NAME", help="run this code that the run's config names"
    )


def run(options: argparse.Namespace) -> int:
    from e3rl.train.replay import replay

    quiet_libraries()
    replay(options.run, options.step, print, trusted=options.trust)
    return 0
