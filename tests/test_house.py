"""The way of a token, counted while a step of the demo runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_way_from_the_step_to_the_forward_pass_stays_short():
    command = [sys.executable, str(ROOT / "tools/house.py"), "--watch", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 5 < found["frames from the step to the forward pass"] <= 10
    assert found["types of ours that carry tokens through a step"] <= 21
