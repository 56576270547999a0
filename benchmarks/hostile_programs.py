"""300 hostile programs and tools: wrong verdicts, the worst delay beyond the limit, what was left behind.

    python -m benchmarks.hostile_programs

Each attack of `tests/environments/hostile.py` in five packings. A verdict is wrong where an unsolved problem counts as solved, or
a program whose attack was refused and which then solves the problem does not. Tools have accidents in isolated environments:
a verdict is wrong where such a trajectory has a reward, or the one beside it has not.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from e3rl.environments.code import run_tests
from tests.environments.hostile import ACCIDENTS, ATTACKS, CHEATS, ENDLESS, EXITS, FLOODS, HOME, VARIANTS, refused
from tests.environments.test_isolation import accident, hosts_left

TESTS = [{"call": "f(4816)", "value": 4817}]
SECONDS = 1.0
TOGETHER = 300


def programs() -> list[tuple[str, str, float]]:
    """Name, source and the verdict it deserves."""
    attacks = {**ATTACKS, **ENDLESS, **FLOODS, **EXITS, **CHEATS}
    found = [(f"{name}, refused", refused(body), 1.0) for name, body in ATTACKS.items()]
    for variant, pack in VARIANTS.items():
        found += [(f"{name}, {variant}", pack(body), 0.0) for name, body in attacks.items()]
    return found[: TOGETHER - len(ACCIDENTS)]


def accidents() -> Iterator[tuple[str, float, bool]]:
    """Name, seconds beyond the limit, and whether the verdict is wrong."""
    for name in ACCIDENTS:
        with tempfile.TemporaryDirectory() as directory:
            rewards, seconds = accident(Path(directory), name, SECONDS)
        wrong = rewards["bad"].value is not None or rewards["good"].value != 4.0
        yield f"tool that {name}", seconds - SECONDS, wrong


def left_behind() -> set[str]:
    """Processes on this machine that run a jail or an isolated environment, and files that attacks would make."""
    commands = {p: p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
    jails = {str(p) for p, command in commands.items() if b"jail.py" in command} | set(map(str, hosts_left()))
    places = ("/tmp/e3rl-hostile", "/dev/shm/e3rl-hostile", str(HOME / ".hostile"), "hostile")
    return jails | {place for place in places if os.path.lexists(place)}


def main() -> None:
    wrong, delays, before = [], [], left_behind()
    for name, source, deserved in programs():
        began = time.monotonic()
        found = run_tests(source, TESTS, SECONDS, 512 * 2**20)
        delays.append((time.monotonic() - began - SECONDS, name))
        if float(found["passed"] == found["total"]) != deserved:
            wrong.append((name, found["why"]))
    for name, delay, mistaken in accidents():
        delays.append((delay, name))
        wrong += [(name, "")] if mistaken else []
    worst, name = max(delays)
    print(
        f"{len(delays)} programs and tools, limit {SECONDS:g} s: {len(wrong)} wrong verdicts, worst delay {worst:+.2f} s ({name})"
    )
    print(f"left behind: {sorted(left_behind() - before) or 'nothing'}")
    for verdict in wrong:
        print("wrong:", *verdict)


if __name__ == "__main__":
    main()
