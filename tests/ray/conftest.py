"""One Ray on this machine for all of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Said aloud where Ray is missing: these tests have a make target of their own."""
    try:
        import ray  # noqa: F401
    except ImportError:
        skip = pytest.mark.skip(reason="Ray is not installed here: make test-ray makes an environment that has it")
        for item in items:
            if "tests/ray" in str(item.path) and item.path.name != "test_without_ray.py":
                item.add_marker(skip)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    yield ray
    ray.shutdown()
