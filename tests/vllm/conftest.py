"""vLLM is started once per model: it takes most of a minute. Every engine of a test is a new one over that core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.models import EOS, build

ROWS, LENGTH = 6, 80


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Said aloud where vLLM is missing: these tests have a make target of their own."""
    try:
        import vllm  # noqa: F401
    except ImportError:
        skip = pytest.mark.skip(reason="vLLM is not installed here: make test-vllm makes an environment that has it")
        for item in items:
            if "tests/vllm" in str(item.path) and item.path.name != "test_without_vllm.py":
                item.add_marker(skip)


def schedule_ahead() -> None:
    """vLLM switches asynchronous scheduling off on CPUs, where little is gained by it. Here it is to be tried."""
    from vllm.platforms.cpu import CpuPlatform

    usual = CpuPlatform.check_and_update_config.__func__

    def changed(kind: Any, config: Any) -> None:
        usual(kind, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(changed)


@pytest.fixture(scope="session")
def model() -> Any:
    """A tiny random model in a shape that vLLM's attention has a kernel for; tests may change its weights."""
    return build("Qwen3", hidden_size=64, head_dim=32)


@pytest.fixture(scope="session")
def core(model: Any) -> Iterator[Any]:
    from e3rl.engine.vllm.core import VllmCore

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if os.environ.get("E3RL_SCHEDULE_AHEAD"):
        schedule_ahead()
    workers = int(os.environ.get("E3RL_TENSOR_PARALLEL", "1"))
    core = VllmCore(
        model, eos_ids=EOS, max_rows=ROWS, cache_rows=2 * ROWS, max_length=LENGTH, tensor_parallel_size=workers
    )
    yield core
    core.close()


@pytest.fixture
def make_engine(model: Any, core: Any) -> Callable[[], Any]:
    from e3rl.engine.vllm.engine import VllmEngine

    def make() -> Any:
        return VllmEngine(model, eos_ids=EOS, max_rows=ROWS, cache_rows=ROWS, max_length=LENGTH, core=core)

    return make
