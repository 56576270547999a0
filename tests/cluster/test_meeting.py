"""Ranks that can't meet, and ranks that wait for the first."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from e3rl.cluster import ranks as module
from e3rl.cluster.ranks import OtherRankGone, Ranks, join_ranks
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


PATIENCE = 1.5


def _rank(rank: int, place: Path, signs: bool) -> None:
    """The first works for longer than the other has patience; the other says how its waiting ended."""
    os.environ["OMP_NUM_THREADS"] = "1"
    module.STILL_HERE = 0.2 if signs else 60.0
    dist.init_process_group("gloo", init_method=f"file://{place / 'meet'}", rank=rank, world_size=2)
    aside = Ranks(rank, 2, patience=timedelta(seconds=PATIENCE)).apart()
    try:
        aside.while_first(lambda: time.sleep(2 * PATIENCE))
        said = "went on"
    except OtherRankGone as error:
        said = str(error)
    (place / f"said-{rank}").write_text(said)
    os._exit(0)


@pytest.mark.parametrize(
    ("signs", "words"), [(True, "went on"), (False, "rank 1 waited for another rank that is gone")]
)
def test_a_rank_waits_for_the_first_as_long_as_that_says_that_it_is_there(signs: bool, words: str, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_rank, args=(n, tmp_path, signs)) for n in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert words in (tmp_path / "said-1").read_text()


def test_what_goes_wrong_in_the_first_rank_alone_is_its_own():
    def fail() -> None:
        raise UserError("the cup is empty")

    with pytest.raises(UserError, match="the cup is empty"):
        Ranks().while_first(fail)
