"""What several tests of this room start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.places import SETTINGS, World
from tests.train.random_lab import lab_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World.of(lab_config(tmp_path_factory.mktemp("run"), *SETTINGS))
    yield world
    for worker in world.workers:
        worker.close()
