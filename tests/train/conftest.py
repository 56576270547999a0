"""A finished run that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.train.trainer import Trainer
from tests.train.embedded import embedded_config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("finished")
    trainer = Trainer(embedded_config(tmp_path))
    trainer.train()
    return trainer.run_path
