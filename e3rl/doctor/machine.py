"""Checks of this machine: requirements, resources, and causes of slowness."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from e3rl.doctor.finding import CheckResult
from e3rl.rewards.pool import PooledCall, ProcessPool

_EXTRAS = ("vllm", "ray", "deepspeed", "peft", "gguf", "tensorboard", "wandb", "trackio")
_LITTLE_MEMORY, _LITTLE_DISK = 4, 5  # GB


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages() -> Iterator[CheckResult]:
    """Required packages and their versions, and the installed optional ones."""
    for line in requires("e3rl") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed(wanted.name)
        if found is None:
            yield CheckResult("problem", wanted.name, f"is missing: pip install '{wanted}'")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield CheckResult("problem", wanted.name, f"{found} is not {wanted.specifier}: pip install '{wanted}'")
        else:
            yield CheckResult("ok", wanted.name, found)
    extras = {name: _installed(name) for name in _EXTRAS}
    there = [f"{name} {found}" for name, found in extras.items() if found]
    absent = [name for name, found in extras.items() if not found]
    yield CheckResult("note", "optional", f"{', '.join(there) or 'none'}; not installed: {', '.join(absent) or 'none'}")


def check_threads() -> Iterator[CheckResult]:
    """Cores, threads, and the setting that makes threads on busy cores many times slower."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    yield CheckResult("ok", "cores", f"{cores}, of which torch uses {threads}")
    if threads > cores:
        yield CheckResult("problem", "threads", f"{threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        yield CheckResult(
            "note", "threads", "OMP_WAIT_POLICY=PASSIVE is much faster where cores are shared; it is not set"
        )


def _memory_gb() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), None)


def check_space(directory: Path) -> Iterator[CheckResult]:
    """Memory, disk, and how long the disk takes to confirm a write."""
    memory = _memory_gb()
    if memory is not None:
        yield CheckResult("ok" if memory >= _LITTLE_MEMORY else "note", "memory", f"{memory:.1f} GB available")
    free = shutil.disk_usage(directory).free / 2**30
    little = free < _LITTLE_DISK
    text = f"{free:.1f} GB free in {directory.resolve()}" + (": checkpoints may not fit" if little else "")
    yield CheckResult("problem" if little else "ok", "disk", text)
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(bytes(2**20))
            began = time.perf_counter()
            file.flush()
            os.fsync(file.fileno())
            yield CheckResult(
                "ok", "disk", f"1 MB written and confirmed in {1000 * (time.perf_counter() - began):.0f} ms"
            )
    except OSError as error:
        yield CheckResult("problem", "disk", f"{directory.resolve()} can't be written: {error.strerror}")


def check_gpu() -> Iterator[CheckResult]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        yield CheckResult("note", "gpu", "none that torch can use: everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield CheckResult(
            "ok", "gpu", f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GB free"
        )


def check_exact() -> Iterator[CheckResult]:
    """Whether a row's numbers depend on its batch size: bit-exact resuming needs that they don't."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(64, 256, generator=generator), torch.randn(512, 256, generator=generator)
    whole = torch.nn.functional.linear(rows, weight)
    same = all(torch.equal(torch.nn.functional.linear(rows[:n], weight), whole[:n]) for n in range(4, 64, 4))
    if same:
        yield CheckResult(
            "ok",
            "exactness",
            "a row has the same bits in batches of any multiple of 4: resumed runs end in the same bits",
        )
    else:
        yield CheckResult(
            "note", "exactness", "a row's last bits depend on its batch: resumed runs are valid, not identical"
        )


def check_rewards() -> Iterator[CheckResult]:
    """Whether a reward worker starts and answers."""
    pool = ProcessPool(1, timeout=20.0)
    began = time.perf_counter()
    try:
        (outcome,) = pool.map([PooledCall("e3rl.rewards.answers:extract_answer", {"text": "\\boxed{4}"})])
    finally:
        pool.close()
    if outcome.value == "4":
        yield CheckResult("ok", "rewards", f"a worker started and answered in {time.perf_counter() - began:.1f} s")
    else:
        yield CheckResult("problem", "rewards", f"a worker does not answer: {outcome.error}")


def check_machine(directory: Path) -> Iterator[CheckResult]:
    """Everything about this machine; ``directory`` is where runs would be written."""
    yield from check_packages()
    yield from check_threads()
    yield from check_space(directory)
    yield from check_gpu()
    yield from check_exact()
    yield from check_rewards()
