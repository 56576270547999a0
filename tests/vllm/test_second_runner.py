"""The engine's contract where a step is scheduled before the tokens of the one before are known, on both model runners.

vLLM does neither on a CPU by itself. The second runner's kernels are Triton's: its interpreter runs them here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("runner", "name"), [("0", "first"), ("1", "second")])
def test_the_contract_holds_while_vllm_schedules_ahead(runner: str, name: str):
    if runner == "1" and find_spec("triton") is None:
        pytest.skip("Triton is not installed here")
    settings = {"VLLM_USE_V2_MODEL_RUNNER": runner, "E3RL_SCHEDULE_AHEAD": "1"}
    if runner == "1":
        settings |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE / "interpreted")}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:xdist", str(HERE / "test_vllm_engine.py")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "AsyncParkingScheduler" in said
    assert ("Using V2 Model Runner" in said) == (runner == "1")
    print(f"\nthe engine's contract, {name} model runner, scheduling ahead: holds")
