"""What is said where Ray is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from e3rl.errors import UserError
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config


def test_missing_ray_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'e3rl\[ray\]'"):
        Trainer(lab_config(tmp_path, "rollout.workers=2"))
