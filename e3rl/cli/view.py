"""`e3rl view`: the pages of runs, served live."""

from __future__ import annotations

import argparse
from pathlib import Path

from e3rl.errors import UserError

LOOPBACK = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--port", type=int, default=8265, help="port to listen on (default 8265)")
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on; other than loopback needs --token")
    parser.add_argument("--token", help="secret that readers must give")


def run(options: argparse.Namespace) -> int:
    from e3rl.web.access import Access

    access = Access(options.host, options.token)
    for path in options.runs:
        if not (path / "config.toml").is_file():
            raise UserError(f"{path} is no run directory: it holds no config.toml")

    from e3rl.report.server import serve

    serve(options.runs, access, options.port)
    return 0
