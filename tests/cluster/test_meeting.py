"""Ranks that can't meet."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from e3rl.cluster.ranks import join_ranks
from e3rl.errors import UserError
from tests.train.random_lab import lab_config


def test_a_meeting_port_that_another_program_has_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"rank 0 can't meet the others at 127\.0\.0\.1:{port}"):
            join_ranks(lab_config(tmp_path, "train.parallel=ddp"))
        assert time.monotonic() - began < 60
