"""Turns with a tool on vLLM: calls, results, erased segments and turns taken back are those of the torch engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from e3rl.engine.torch.engine import TorchEngine
from e3rl.models import Policy, load_policy
from e3rl.types import Group
from tests.environments.lab_rolls import EVERYTHING, LONGEST, configured, kinds, rolled, trajectories

ROWS = 12


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(configured().model)


@pytest.fixture(scope="module")
def tool_core(policy: Policy) -> Iterator[Any]:
    from e3rl.engine.vllm.core import VllmCore

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    core = VllmCore(policy.model, eos_ids=policy.eos_ids, max_rows=ROWS, cache_rows=2 * ROWS, max_length=LONGEST)
    yield core
    core.close()


def told(groups: list[Group]) -> list[Any]:
    """What the trajectories became, turn by turn; the seconds of their tools left out."""

    def seen(observed: Any) -> Any:
        return observed and (observed.calls, observed.state, observed.forced)

    return [
        (
            t.ids.tolist(),
            t.drawn_T.tolist(),
            t.finish,
            [(s.index, len(s.candidate.ids), seen(s.observation)) for s in t.segments],
            [(e.start, e.candidate.ids.tolist(), seen(e.observation)) for e in t.erasures],
        )
        for t in trajectories(groups)
    ]


@pytest.mark.parametrize("isolate", [False, True], ids=["in this process", "isolated"])
def test_tools_on_vllm_are_tools_on_torch(policy: Policy, tool_core: Any, isolate: bool):
    from e3rl.engine.vllm.engine import VllmEngine

    config = configured(f"environments.isolate={str(isolate).lower()}")
    held: dict[str, Any] = {"eos_ids": policy.eos_ids, "max_rows": ROWS, "cache_rows": ROWS, "max_length": LONGEST}
    theirs = rolled(VllmEngine(policy.model, **held, core=tool_core), policy, config)
    ours = rolled(TorchEngine(policy.model, **held), policy, config)
    assert told(theirs) == told(ours)
    assert kinds(ours) == EVERYTHING
    for vllm, plain in zip(trajectories(theirs), trajectories(ours), strict=True):
        torch.testing.assert_close(torch.tensor(vllm.logprobs), torch.tensor(plain.logprobs), atol=1e-4, rtol=0)
