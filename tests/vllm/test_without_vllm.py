"""What is said where vLLM is not there, or would run without our sampler."""

from __future__ import annotations

import sys

import pytest

from e3rl.config import RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from tests.engine.models import EOS, tiny


def test_missing_vllm_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'e3rl\[vllm\]'"):
        build_engine(RolloutConfig(engine="vllm"), tiny("Qwen3"), EOS, 8)
