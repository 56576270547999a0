"""What is said where vLLM is not there, and what is asked of it first."""

from __future__ import annotations

import sys

import pytest

from e3rl.config import RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.engine.vllm.core import precedence
from e3rl.errors import UserError
from e3rl.types import Draw
from tests.engine.models import EOS, tiny


def test_missing_vllm_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'e3rl\[vllm\]'"):
        build_engine(RolloutConfig(engine="vllm"), tiny("Qwen3"), EOS, 8)


def test_retries_go_first_then_laggards():
    asked = [(0, 0), (3, 0), (1, 0), (2, 1), (0, 2)]  # segment, attempt
    draws = [Draw(0, 0, "p", 0, segment, attempt) for segment, attempt in asked]
    order = sorted(range(len(draws)), key=lambda i: precedence(draws[i]))
    assert [asked[i] for i in order] == [(0, 2), (2, 1), (0, 0), (1, 0), (3, 0)]
