"""OpenEnv's validator of endpoints, which decides before a rollout whether an endpoint can be trained against."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from e3rl.models import resolve_model_path
from tests.clients.conftest import served


def test_openenvs_validator_finds_an_endpoint_to_train_against(tmp_path: Path):
    """It takes tools, and its log-probabilities are those of the distribution that was drawn from, temperature included. The
    validator asks for 512 tokens behind its prompt, more than the lab's context."""
    capture = pytest.importorskip("openenv.core.harness.capture")
    model = Path(shutil.copytree(resolve_model_path("lab-tools"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    with served(str(model), "rollout.erase=false", "--name", "lab", "--max-length", "1024") as url:
        report = capture.validate_llm(url, "lab")
    assert (report.ok, report.reachable, report.capture_level) == (True, True, "tokens")
    assert (report.logprobs_mode, report.param_fixes) == ("processed", [])
    assert report.tool_support in (
        "ok",
        "no-tool-call",
    )  # the manifest was taken; what the lab's model makes of it is its own
    assert not [finding for finding in report.findings if "FATAL" in finding]
