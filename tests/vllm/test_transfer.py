"""New weights inside vLLM through shared memory: whole and of the version sent, or refused with the old ones in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from e3rl.errors import UserError
from e3rl.testing.scripts import assert_same
from e3rl.types import Candidate
from tests.vllm.test_vllm_engine import TOLERANCE, generate, oracle

PROMPT = (9, 8, 7, 6)


@pytest.fixture
def changed(model: Any, core: Any) -> Iterator[dict[str, Tensor]]:
    """Other weights; afterwards vLLM has those of before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    yield {n: t + 0.3 * torch.randn(t.shape, generator=generator) for n, t in before.items() if t.ndim == 2}
    model.load_state_dict(before)
    core.reload()


def first(engine: Any) -> Candidate:
    [row] = engine.prefill(PROMPT, 1)
    candidate = generate(engine, row, 8)
    engine.release(row)
    return candidate


def test_weights_travel_without_files_and_are_not_kept_where_they_lay(
    model: Any, core: Any, make_engine: Callable[[], Any], changed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    def written(*_: object) -> None:
        raise AssertionError("files were written")

    monkeypatch.setattr("e3rl.weights.vllm.write_model", written)
    engine = make_engine()
    engine.load_weights(changed, 1)
    core._sender._publisher._memory.image.zero_()  # vLLM has copies
    assert_same(first(engine), first(oracle(model)), TOLERANCE, "after the update")


def test_weights_travel_as_files_where_memory_can_not_be_shared(
    model: Any, core: Any, make_engine: Callable[[], Any], changed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(core._sender, "_publisher", None)
    engine = make_engine()
    engine.load_weights(changed, 1)
    assert_same(first(engine), first(oracle(model)), TOLERANCE, "after the update")


@pytest.mark.parametrize("fault", ["versions cross", "never finished"])
def test_what_is_refused_leaves_the_old_weights_and_no_update_open(
    core: Any, make_engine: Callable[[], Any], changed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, fault: str
):
    engine = make_engine()
    old = first(engine)
    publisher = core._sender._publisher
    publish = publisher.publish

    def other(*arguments: Any) -> Any:
        published = publish(*arguments)
        if fault == "versions cross":
            return dataclasses.replace(published, offer=dataclasses.replace(published.offer, version=-7))
        publisher._memory.set_state(-1)
        return published

    with monkeypatch.context() as patched:
        patched.setattr(publisher, "publish", other)
        with pytest.raises(UserError, match=f"vLLM did not take new weights: .*{fault}"):
            engine.load_weights(changed, 1)
    assert engine.policy_version == 0
    assert_same(first(engine), old, TOLERANCE, "with the old weights")
    engine.load_weights({}, 2)
    assert first(engine).ids.tolist() != old.ids.tolist()
