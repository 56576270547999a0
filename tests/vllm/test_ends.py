"""vLLM's processes and this one end each other: none waits for one that is gone, and none stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from e3rl.engine.protocol import Sampling
from e3rl.engine.vllm import core
from e3rl.errors import UserError
from e3rl.types import Draw
from tests.engine.models import build

pytest.importorskip("vllm")
LENGTH = 4000
SECONDS = 90
"""On a busy machine; alone it takes a second or two."""


def engine(workers: int) -> Any:
    """One that divides a small model among workers, and is asked for what takes long."""
    from e3rl.engine.vllm.engine import VllmEngine

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = build("Qwen3", hidden_size=64, head_dim=32, max_position_embeddings=LENGTH)
    found = VllmEngine(model, eos_ids=(), max_rows=1, cache_rows=1, max_length=LENGTH, tensor_parallel_size=workers)
    [row] = found.prefill((5, 6, 7, 8), 1)
    found.extend(row, LENGTH - 100, Draw(0, 0, "p", 0, 0, 0), Sampling())
    return found


def started_by(parent: psutil.Process) -> list[psutil.Process]:
    """vLLM's engine and workers, not what keeps books on shared memory."""
    return [p for p in parent.children(recursive=True) if "VLLM::" in "".join(p.cmdline())]


@pytest.mark.parametrize("dies", [True, False])
def test_a_call_that_fails_while_vllm_ends_is_told_from_one_that_fails(dies: bool, monkeypatch: pytest.MonkeyPatch):
    """Where a worker dies, the engine's answer to the call under way may come before its end: an error of no class of its own."""
    monkeypatch.setattr(core, "SECONDS_TO_END", 60.0 if dies else 0.1)
    with subprocess.Popen(["sleep", "1" if dies else "60"]) as process:
        sentinel = os.pidfd_open(process.pid)
        manager = SimpleNamespace(processes=[SimpleNamespace(sentinel=sentinel)])
        client = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        with (
            pytest.raises(UserError if dies else Exception, match="has died" if dies else "method failed"),
            core._living(client),
        ):
            raise Exception("Call to collective_rpc method failed: cancelled")
        with pytest.raises(ValueError, match="own"), core._living(client):
            raise ValueError("own")
        process.kill()
    os.close(sentinel)


HANGING = """
import multiprocessing, os, signal, time
from e3rl.engine.vllm import inside

def hang(name):
    inside.SECONDS_TO_END = 1.0
    inside.TransferringWorker.end_with_engine(None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(name, os.getpid(), flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    for name in ("VllmWorker-0", "another"):
        multiprocessing.get_context("fork").Process(target=hang, args=(name,), name=name).start()
    time.sleep(1000)
"""


@pytest.mark.timeout(200)
def test_a_worker_that_hangs_ends_with_its_engine():
    """And is deaf to signals; a process that is no worker is left alone."""
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        started = dict(line.split() for line in (parent.stdout.readline(), parent.stdout.readline()))
        worker, another = (psutil.Process(int(started[name])) for name in ("VllmWorker-0", "another"))
        parent.kill()
        try:
            worker.wait(SECONDS)
            assert another.is_running()
        finally:
            for process in (worker, another):
                if process.is_running():
                    process.kill()


@pytest.mark.timeout(400)
def test_vllm_ends_with_a_process_that_is_killed():
    """In the middle of a segment, with two workers: nothing holds the device."""
    code = "from tests.vllm.test_ends import engine; e = engine(2); print('asked', flush=True); e.poll()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert any(line.strip() == "asked" for line in client.stdout)
        processes = started_by(psutil.Process(client.pid))
        client.send_signal(signal.SIGKILL)
    assert len(processes) == 3
    began = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    for process in alive:
        process.kill()
    assert not alive
    print(f"\nthree processes of vLLM's ended {time.monotonic() - began:.1f} s after what had started them")


@pytest.mark.timeout(400)
def test_a_killed_worker_is_a_sentence():
    found = engine(2)
    try:
        [worker] = [p for p in started_by(psutil.Process()) if "Worker_TP1" in "".join(p.cmdline())]
        worker.kill()
        with pytest.raises(UserError, match="a process of vLLM's has died"):
            found.poll()
    finally:
        found.close()
