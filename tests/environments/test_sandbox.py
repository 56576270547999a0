"""Hostile programs: refused, ended in time, nothing left behind, nobody else hurt."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any

import pytest

from e3rl.environments import jail, sandbox
from e3rl.environments.code import run_tests
from e3rl.environments.sandbox import Limits, SandboxUnavailable, bubblewrap_arguments, run_program
from tests.environments.hostile import ATTACKS, CHEATS, ENDLESS, EXITS, FLOODS, HOME, RIGHT, VARIANTS, refused

TESTS = [{"call": "f(4816)", "value": 4817}]
MEMORY = 512 * 2**20


def verdict(program: str, seconds: float = 3.0) -> float:
    found = run_tests(program, TESTS, seconds, MEMORY)
    return float(found["passed"] == found["total"])


def left_behind() -> set[str]:
    """Children of this process that still run, and files that attacks would make."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    places = [Path("/tmp/e3rl-hostile"), Path("/dev/shm/e3rl-hostile"), HOME / ".hostile", Path("hostile")]
    return {*children, *(str(p) for p in places if os.path.lexists(p))}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_leaves_nothing(name: str):
    before = left_behind()
    assert verdict(refused(ATTACKS[name]), seconds=15.0) == 1, "it got through, or took the right solution with it"
    assert verdict(VARIANTS["bare"](ATTACKS[name])) == 0
    assert left_behind() == before


@pytest.mark.parametrize("name", [*ENDLESS, *FLOODS])
def test_what_never_ends_is_ended(name: str):
    began = time.monotonic()
    assert verdict({**ENDLESS, **FLOODS}[name], seconds=0.3) == 0
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", [*EXITS, *CHEATS])
def test_exits_and_cheats_are_wrong(name: str):
    for variant in ("bare", "in the call"):
        assert verdict(VARIANTS[variant]({**EXITS, **CHEATS}[name])) == 0


def test_a_right_program_is_right():
    assert verdict(RIGHT) == 1


def test_what_a_program_prints_reads_and_returns():
    ran = run_program("x = input()\nprint('got', x)\n", stdin="a\nb\n", calls=["x * 2", "(1, {'k': None})", "'l\\nm'"])
    assert (ran.stdout, ran.stderr, ran.values) == ("got a\n", "", ("'aa'", "(1, {'k': None})", "'l\\nm'"))
    assert (ran.status, ran.stopped, ran.failure) == (0, None, None)


@pytest.mark.parametrize("order", [sorted, lambda ready: sorted(ready, reverse=True)], ids=["first", "last"])
def test_a_flood_that_comes_with_the_start_is_the_programs(monkeypatch: pytest.MonkeyPatch, order: Any):
    waiting = select.select

    def late(*arguments: Any) -> Any:
        time.sleep(0.2)
        ready, *others = waiting(*arguments)
        return (order(ready), *others)

    monkeypatch.setattr(select, "select", late)
    assert run_program("print('x' * 10**6)", limits=Limits(output=1000)).stopped == "output"


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("while True: pass", "took too long"),
        ("print('x' * 200)", "printed too much"),
        ("import os\nos.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise SystemExit(4)", "exit status 4"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_failure_is_said_in_a_few_words(program: str, failure: str):
    ran = run_program(program, limits=Limits(0.3, MEMORY, 190))
    assert ran.failure == failure or (failure == "SyntaxError: invalid syntax" and "program.py" in ran.stderr)


def test_a_traceback_shows_the_program_alone():
    assert "jail.py" not in run_program("def f():\n    1 / 0\nf()").stderr


def test_the_time_of_the_program_counts_and_not_its_start():
    assert run_program("import time\ntime.sleep(0.2)", limits=Limits(0.6)).stopped is None


def test_a_machine_that_confines_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "jail.py"
    broken.write_text(Path(jail.__file__).read_text().replace("if version < 1", "if version < 10**6"))
    monkeypatch.setattr(jail, "__file__", str(broken))
    monkeypatch.setattr(sandbox, "_bubblewrap", sandbox._bubblewrap.__wrapped__)  # shows the files of the moment
    with pytest.raises(SandboxUnavailable, match="Landlock is switched off"):
        run_program("print(1)")


def test_the_filter_refuses_and_allows_by_number():
    """The instructions, executed here one by one, against what they are for."""

    def run(number: int, *arguments: int, architecture: int = 0xC000003E) -> int:
        data = {0: number, 4: architecture}
        for n, value in enumerate(arguments):
            data |= {16 + 8 * n: value & 0xFFFFFFFF, 20 + 8 * n: value >> 32}
        code, at, held = jail.seccomp_filter("x86_64", 77), 0, 0
        while True:
            what, yes, no, operand = code[at]
            at += 1
            if what == 0x20:
                held = data.get(operand, 0)
            elif what == 0x06:
                return operand
            else:
                test = {0x15: held == operand, 0x35: held >= operand, 0x45: bool(held & operand)}[what]
                at += yes if test else no

    allow, refuse = 0x7FFF0000, 0x00050001
    assert run(0) == run(1) == run(9) == run(231) == allow  # read, write, mmap, exit_group
    assert run(41) == run(57) == run(59) == refuse  # socket, fork, execve
    assert run(56, 17) == refuse
    assert run(56, 0x3D0F00) == allow
    assert run(435) == 0x00050026
    assert run(62, 77) == run(234, 77) == allow
    assert run(62, 78) == run(62, 0) == run(62, 2**32 - 1) == refuse
    assert run(302, 0, 3, 0) == allow
    assert run(302, 5, 3, 0) == run(302, 0, 3, 2**32) == run(302, 0, 3, 8) == refuse
    assert run(0x40000000 + 1) == refuse
    assert run(1, architecture=0x40000003) == 0x80000000


def test_bubblewrap_is_used_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A stand-in that drops the arguments up to -- and says so, then one that passes signals on, then one that fails."""
    stand_in = tmp_path / "bwrap"
    drop = '#!/bin/sh\ntouch "$(dirname "$0")/used"\nwhile [ "$1" != -- ]; do shift; done\nshift\n'
    stand_in.write_text(f'{drop}exec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sandbox._bubblewrap.cache_clear()
    try:
        assert run_program("print(1)").stdout == "1\n"
        assert (tmp_path / "used").exists()
        stand_in.write_text(f'{drop}"$@"\nexit $?\n')  # as bubblewrap: 128 and the signal
        assert run_program("import os\nos.kill(os.getpid(), 11)").failure == "was ended by SIGSEGV"
        assert run_program("raise SystemExit(4)").failure == "exit status 4"
        sandbox._bubblewrap.cache_clear()
        stand_in.write_text("#!/bin/sh\nexit 1\n")
        assert run_program("print(1)").stdout == "1\n"
    finally:
        sandbox._bubblewrap.cache_clear()
    arguments = bubblewrap_arguments("bwrap")
    assert "--unshare-all" in arguments
    assert "--die-with-parent" in arguments
    assert "--bind" not in arguments
