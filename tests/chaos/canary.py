"""Artefacts that mean harm, of every kind that a command reads: any byte of them that is run trips the canary.

    python -m tests.chaos.canary

Each artefact carries code in the forms by which data has become code before: plug-in names, pickles, templates, shell
words, Python files beside the data, classes of other libraries. Every command that reads the artefact is run on it, in a
process whose audit hook sees what is compiled, executed, imported, unpickled, loaded or started. No mark may be left, and
no event may name the artefact.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from e3rl.cli.main import main as e3rl
from tests.chaos.artefacts import KINDS, SHORT, Payload
from tests.chaos.kills import preload
from tests.train.random_lab import random_lab

PATIENCE = 120.0


def _watch(hostile: Path, seen: int) -> None:
    """Write down every event of this process by which something of ``hostile`` is run."""
    root = str(hostile)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        said = ""
        if event in ("exec", "compile"):
            code = arguments[0] if event == "exec" else arguments[1]
            name = str(getattr(code, "co_filename", code))
            said = f"{event} {name}" if root in name else ""
        elif event == "pickle.find_class":
            said = f"unpickled {arguments[0]}.{arguments[1]}" if arguments[0] in ("builtins", "io", "_io", "os") else ""
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen"):
            said = f"{event} {arguments!r}" if "OWNED" in repr(arguments) or f"{root}/" in str(arguments[0]) else ""
        elif event == "import":
            said = f"import {arguments[1]}" if root in str(arguments[1]) else ""
        if said:
            os.write(seen, said[:300].encode() + b"\n")

    sys.addaudithook(hook)


@dataclass
class Ended:
    """How a command ended: its status, None where it had to be killed, and what it said."""

    status: int | None
    said: str


def command(arguments: list[str], hostile: Path, work: Path) -> Ended:
    """Run e3rl in a forked process, in the directory of the artefact, under the audit hook."""
    log, events = work / "said", work / "events"
    log.unlink(missing_ok=True)
    events.write_bytes(b"")
    child = os.fork()
    if child == 0:
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(hostile)
            torch.set_num_threads(1)
            _watch(hostile, os.open(events, os.O_WRONLY | os.O_APPEND))
            status = e3rl(arguments)
            (work / "said.modules").write_text(json.dumps(sorted(sys.modules)))
            os._exit(status)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    end, waited, status = time.monotonic() + PATIENCE, 0, 0
    while not waited and time.monotonic() < end:
        waited, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    if not waited:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return Ended(
        os.waitstatus_to_exitcode(status) if waited else None, log.read_text(encoding="utf-8", errors="replace")
    )


@dataclass
class Canary:
    """How many artefacts were read by how many commands, and what was wrong."""

    artefacts: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        each = ", ".join(f"{kind} {n} ({self.commands[kind]} commands)" for kind, n in self.artefacts.items())
        return [
            f"canary: {sum(self.artefacts.values())} artefacts read by {sum(self.commands.values())} commands: {each}; "
            f"wrong {len(self.wrong)}",
            *self.wrong,
        ]


def try_artefacts(kinds: list[str], every: int = 1) -> Canary:
    """Run every command on every ``every``-th artefact of these kinds."""
    found = Canary()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as hostile, tempfile.TemporaryDirectory() as elsewhere:
            p, work = Payload(Path(hostile)), Path(elsewhere)
            command(["decode", random_lab(), "1+1", "--samples", "2", *SHORT], p.directory, work)
            preload(work / "said")
            for number, (name, commands) in enumerate(KINDS[kind](p)):
                if number % every:
                    continue
                found.artefacts[kind] += 1
                for arguments in commands:
                    ended = command(arguments, Path(hostile), work)
                    found.commands[kind] += 1
                    what = f"{name}: e3rl {' '.join(arguments)[:120]}"
                    if tripped := p.tripped(work / "events"):
                        found.wrong.append(f"{what}: RAN {tripped[:3]}")
                    if "Traceback" in ended.said or ended.status not in (0, 1, 2):
                        found.wrong.append(f"{what}: exit {ended.status}: {ended.said[-700:]}")
                    if p.mark.is_dir():
                        p.mark.rmdir()
                    p.mark.unlink(missing_ok=True)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    found = try_artefacts(options.kinds)
    print("\n".join(found.lines()))
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
