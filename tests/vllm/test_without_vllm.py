"""What is said where vLLM is not there or does not take new weights, and what is asked of it first."""

from __future__ import annotations

import sys
from concurrent.futures import Future, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e3rl.config import RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.engine.vllm.core import precedence
from e3rl.errors import UserError
from e3rl.types import Draw
from e3rl.weights.image import tensors_of
from e3rl.weights.publish import Offer, Receiver, this_node
from e3rl.weights.vllm import WeightSender
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


class StandIn:
    """The calls that a running vLLM answers; ``fault`` is what its workers raise, 'silent' no answer at all."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.calls, self.taken = fault, list[str](), dict[str, Any]()
        self.vllm_config = SimpleNamespace(weight_transfer_config=object())
        self.engine_core = SimpleNamespace(utility_results={})

    def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> None:
        self.calls.append(method)
        if self.fault == "silent" and method == "update_weights":
            future = self.engine_core.utility_results[0] = Future[None]()
            wait([future], 10)
            assert future.done(), "nobody gave up"
            future.result()
        if method == self.fault:
            raise Exception(f"{method} failed")
        if method == "update_weights":
            assert kwargs is not None
            with Receiver().taken(Offer(**kwargs["update_info"]), 1) as image:
                self.taken = {name: tensor.clone() for name, tensor in tensors_of(image).items()}


ONE_UPDATE = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]


@pytest.mark.skipif(not this_node(), reason="no process's memory can be opened by another here")
def test_weights_go_through_shared_memory_by_vllms_interface(tmp_path: Path):
    model, llm = tiny("Qwen3"), StandIn()
    WeightSender(llm, tmp_path).send(model, 4)
    assert llm.calls == ONE_UPDATE
    assert not [*tmp_path.iterdir()]
    own = {name: tensor for name, tensor in model.state_dict().items() if name in llm.taken}
    assert {*model.state_dict()} - own.keys() <= {"lm_head.weight"}
    assert all(tensor.equal(llm.taken[name]) for name, tensor in own.items())


def test_weights_go_as_files_where_a_worker_can_not_open_the_memory(tmp_path: Path):
    llm = StandIn(fault="init_weight_transfer_engine")
    WeightSender(llm, tmp_path).send(tiny("Qwen3"), 4)
    assert llm.calls == ["init_weight_transfer_engine", "reload_weights"]
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.skipif(not this_node(), reason="no process's memory can be opened by another here")
def test_weights_that_vllm_refuses_or_never_answers_for_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="did not take new weights: update_weights failed"):
        WeightSender(StandIn(fault="update_weights"), tmp_path).send(tiny("Qwen3"), 4)
    monkeypatch.setattr("e3rl.weights.vllm.SECONDS_TO_ANSWER", 0.1)
    with pytest.raises(UserError, match=r"did not take new weights within 0\.1 s: one of its processes hangs"):
        WeightSender(StandIn(fault="silent"), tmp_path).send(tiny("Qwen3"), 4)
