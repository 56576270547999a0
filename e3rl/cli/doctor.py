"""`e3rl doctor`: check this machine, or a run directory, and say what to put right."""

from __future__ import annotations

import argparse
from pathlib import Path

from e3rl.errors import UserError

_SIGNS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="a run directory; without one, this machine is checked")
    parser.add_argument(
        "--repair", action="store_true", help="cut damaged log lines, put damaged files aside, remove half-written ones"
    )


def run(options: argparse.Namespace) -> int:
    if options.repair and options.run is None:
        raise UserError("--repair needs a run directory: e3rl doctor RUN --repair")
    if options.run is not None and not options.run.is_dir():
        raise UserError(f"{options.run} is no directory")

    from e3rl.doctor.machine import check_machine
    from e3rl.doctor.run import check_run, repair_run

    findings = []
    for finding in check_machine(Path()) if options.run is None else check_run(options.run):
        print(f"{_SIGNS[finding.kind]}  {finding.subject}: {finding.text}", flush=True)
        findings.append(finding)
    problems = [f for f in findings if f.kind == "problem"]
    if options.repair:
        print(f"put right: {repair_run(options.run, findings)} of {len(problems)}")
        problems = [f for f in problems if f.repair is None]
    elif any(f.repair for f in problems):
        print(f"'e3rl doctor {options.run} --repair' puts right what can be")
    return 1 if problems else 0
