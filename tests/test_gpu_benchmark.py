"""`benchmarks/gpu.py` runs to its end on a CPU with a tiny model, and says what it needs where there is no GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, check=False)


def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path):
    done = _run("--device", "cpu", "--small", "--no-peers", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"attention kernel", "decoding", "new weights", "training", "memory", "device"} == found.keys()
    figures = [*found["decoding"].values(), *found["training"].values(), *found["new weights"].values()]
    assert all(math.isfinite(value) and value > 0 for value in figures)
    training = found["training"]
    assert training["all TFLOP/s"] / training["model TFLOP/s"] == pytest.approx(10 / 6)
    assert found["memory"]["planned GiB"] > 0
    assert all(f"{name}: " in done.stdout for name in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    done = _run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "--device cpu --small" in done.stderr
    assert _run("--device", "cpu").returncode == 2
