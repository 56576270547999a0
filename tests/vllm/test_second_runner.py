"""The engine's contract as vLLM runs on GPUs: a step is scheduled before the tokens of the one before are known, on both model
runners, by one worker and by two that divide the model.

vLLM does none of it on a CPU by itself. The second runner's kernels are Triton's: its interpreter runs them here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIRST = {"VLLM_USE_V2_MODEL_RUNNER": "0", "E3RL_SCHEDULE_AHEAD": "1"}
SECOND = FIRST | {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(HERE / "interpreted"),
    # vLLM compiles some of what divides a model, and its compiler asks Triton for a device
    "TORCH_COMPILE_DISABLE": "1",
}
TWO = {"E3RL_TENSOR_PARALLEL": "2"}
A_PART = "oracle or greedy"
"""Of the tests: by the interpreter in two workers they take long."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("settings", "tests"),
    [
        pytest.param(FIRST, "", id="first runner"),
        pytest.param(SECOND, "", id="second runner"),
        pytest.param(FIRST | TWO, "", id="first runner, two workers"),
        pytest.param(SECOND | TWO, A_PART, id="second runner, two workers"),
    ],
)
def test_the_contract_holds_while_vllm_schedules_ahead(
    settings: dict[str, str], tests: str, request: pytest.FixtureRequest
):
    second = settings["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    if second and find_spec("triton") is None:
        pytest.skip("Triton is not installed here")
    path = os.pathsep.join(filter(None, (settings.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:xdist",
        "-k",
        tests,
        str(HERE / "test_vllm_engine.py"),
    ]
    done = subprocess.run(
        command, env=os.environ | settings | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "AsyncParkingScheduler" in said
    assert ("Using V2 Model Runner" in said) == second
    assert ("Worker_TP1" in said) == ("E3RL_TENSOR_PARALLEL" in settings)
    print(f"\nthe engine's contract, scheduling ahead, {request.node.callspec.id}: holds")
