"""The worker pool on tasks that hang, crash, devour memory or lie."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e3rl.errors import UserError
from e3rl.rewards.pool import Outcome, PooledCall, ProcessPool

HERE = "tests.rewards.tasks"


def task(name: str, **arguments: object) -> PooledCall:
    return PooledCall(f"{HERE}:{name}", arguments)


def children() -> set[int]:
    """Processes whose parent is this one, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    before = children()
    made = ProcessPool(2, timeout=1.0)
    yield made
    made.close()
    assert children() <= before


def test_outcomes_keep_the_order_and_workers_start_when_needed(pool: ProcessPool) -> None:
    assert pool.pids == []
    assert pool.map([]) == []
    assert pool.pids == []
    outcomes = pool.map([task("double", x=i) for i in range(50)])
    assert outcomes == [Outcome(2 * i) for i in range(50)]
    assert 1 <= len(pool.pids) <= 2
    assert pool.restarts == 0


def test_workers_are_reused(pool: ProcessPool) -> None:
    pids = {o.value for _ in range(3) for o in pool.map([task("pid")] * 4)}
    assert pids == set(pool.pids)


def test_workers_import_no_more_than_they_need(pool: ProcessPool) -> None:
    (outcome,) = pool.map([task("loaded_modules")])
    assert "torch" not in outcome.value
    assert "numpy" not in outcome.value
    assert "transformers" not in outcome.value


def test_exceptions_become_errors_and_the_worker_lives(pool: ProcessPool) -> None:
    pool.map([task("double", x=1)] * 2)
    pids = set(pool.pids)
    failed = pool.map(
        [task("fail"), task("leave"), task("unserialisable"), task("double", y=1), task("no_such_function")]
    )
    assert [o.value for o in failed] == [None] * 5
    assert re.fullmatch(r"ValueError: bad input \(tasks\.py:\d+\)", failed[0].error or "")
    assert re.fullmatch(r"SystemExit: 3 \(tasks\.py:\d+\)", failed[1].error or "")
    assert failed[2].error is not None
    assert failed[2].error.startswith("returned what is no plain value")
    assert failed[3].error is not None
    assert "unexpected keyword argument 'y'" in failed[3].error
    assert failed[4].error is not None
    assert failed[4].error.startswith("AttributeError")
    assert set(pool.pids) == pids


def test_python_that_hangs_is_interrupted_in_its_worker(pool: ProcessPool) -> None:
    began = time.monotonic()
    outcomes = pool.map([task("sleep", seconds=60), task("swallow_exceptions"), task("double", x=4)])
    assert [o.error for o in outcomes] == ["took longer than 1 s", "took longer than 1 s", None]
    assert outcomes[2].value == 8
    assert pool.restarts == 0
    assert time.monotonic() - began < 10


def test_what_can_not_be_interrupted_is_killed_with_all_that_it_started(pool: ProcessPool) -> None:
    outcomes = pool.map([task("deaf_with_child", file=""), task("double", x=4)])
    assert outcomes[0].error == "took longer than 1 s; its worker was killed"
    assert outcomes[1] == Outcome(8)
    assert pool.restarts == 1
    assert pool.map([task("double", x=5)]) == [Outcome(10)]


def test_a_grandchild_dies_with_the_worker(pool: ProcessPool, tmp_path: Path) -> None:
    pool.map([task("deaf_with_child", file=str(tmp_path / "pid"))])
    grandchild = int((tmp_path / "pid").read_text())
    assert _ends(grandchild, seconds=5)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_crash_is_tried_once_more(pool: ProcessPool, tmp_path: Path) -> None:
    outcomes = pool.map([task("die_first_time", file=str(tmp_path / "mark")), task("double", x=1)])
    assert outcomes == [Outcome("alive"), Outcome(2)]
    assert pool.restarts == 1


def test_a_second_crash_is_an_error(pool: ProcessPool) -> None:
    (outcome,) = pool.map([task("die")])
    assert outcome.error == "the worker died twice (SIGSEGV)"
    assert pool.restarts == 2


def test_kill_9_while_working(pool: ProcessPool) -> None:
    pool.map([task("double", x=1)] * 2)
    victims = list(pool.pids)
    timer = threading.Timer(0.2, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims])
    timer.start()
    outcomes = pool.map([task("sleep", seconds=0.5)] * 2)
    timer.join()
    assert outcomes == [Outcome("slept")] * 2
    assert pool.restarts == len(victims)
    assert not set(victims) & set(pool.pids)


def test_kill_9_while_idle(pool: ProcessPool) -> None:
    pool.map([task("double", x=1)])
    (victim,) = pool.pids
    os.kill(victim, signal.SIGKILL)
    assert pool.map([task("double", x=2)] * 3) == [Outcome(4)] * 3


def test_the_memory_limit_holds_for_its_task_alone(pool: ProcessPool) -> None:
    greedy = {"megabytes": 150}
    limited = PooledCall(f"{HERE}:allocate", greedy, memory=100 * 2**20)
    assert [o.error for o in pool.map([limited])] == ["ran out of its memory limit"]
    assert pool.map([task("allocate", **greedy)]) == [Outcome(150)]


def test_arguments_that_can_not_travel(pool: ProcessPool) -> None:
    outcomes = pool.map([task("double", x=lambda: 0), task("double", x=2)])
    assert outcomes[0].error is not None
    assert outcomes[0].error.startswith("can't be sent to a worker")
    assert outcomes[1] == Outcome(4)


def test_setup_runs_once_a_worker_and_outside_the_time_limit() -> None:
    with_setup = [PooledCall(f"{HERE}:slow_setup", {"x": i}, setup="1.5") for i in range(4)]
    pool = ProcessPool(1, timeout=1.0)
    try:
        assert pool.map(with_setup) == [Outcome([1, i]) for i in range(4)]
    finally:
        pool.close()


def test_threads_take_turns(pool: ProcessPool) -> None:
    results: dict[int, list[Outcome]] = {}

    def use(number: int) -> None:
        results[number] = pool.map([task("double", x=number * 100 + i) for i in range(20)])

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [Outcome(2 * (n * 100 + i)) for i in range(20)] for n in range(4)}


def test_closing_twice_and_using_a_closed_pool() -> None:
    before = children()
    pool = ProcessPool(1, timeout=1.0)
    pool.map([task("double", x=1)])
    pool.close()
    pool.close()
    assert children() <= before
    with pytest.raises(UserError, match="closed"):
        pool.map([task("double", x=1)])


def test_a_forgotten_pool_takes_its_workers_with_it() -> None:
    before = children()
    pool = ProcessPool(1, timeout=1.0)
    pool.map([task("double", x=1)])
    del pool
    gc.collect()
    assert children() <= before


def test_interrupted_batches_leave_no_stale_answer(pool: ProcessPool) -> None:
    pool.map([task("double", x=1)])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.map([task("sleep", seconds=0.7)])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert pool.map([task("double", x=3)]) == [Outcome(6)]


def _run_until_killed(script: str) -> None:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def _ends(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


def test_idle_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """The parent has no chance to clean up; the pipe's end tells the worker."""
    file = tmp_path / "pid"
    _run_until_killed(
        "import os, pathlib, signal\n"
        "from e3rl.rewards.pool import PooledCall, ProcessPool\n"
        "pool = ProcessPool(1, 5.0)\n"
        f"pool.map([PooledCall('{HERE}:double', {{'x': 1}})])\n"
        f"pathlib.Path({str(file)!r}).write_text(str(pool.pids[0]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert _ends(int(file.read_text()), seconds=10)


def test_a_hanging_worker_ends_even_when_nobody_is_left_to_kill_it(tmp_path: Path) -> None:
    """The kernel ends it by the CPU time that it burns."""
    file = tmp_path / "pid"
    _run_until_killed(
        "import os, pathlib, signal, threading, time\n"
        "from e3rl.rewards.pool import PooledCall, ProcessPool\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "def kill():\n"
        "    while not file.exists() or not file.read_text():\n"
        "        time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=kill).start()\n"
        f"ProcessPool(1, 0.1).map([PooledCall('{HERE}:deaf_loop', {{'file': str(file)}})])\n"
    )
    assert _ends(int(file.read_text()), seconds=40)
