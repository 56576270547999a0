"""Weights by broadcast: whole in every worker, or in none of those that it broke for, in bounded time and with a sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from e3rl.cluster import broadcast as module
from e3rl.cluster.broadcast import Audience, Broadcast, Broadcaster, BroadcastFailed, Meeting
from e3rl.cluster.client import server_place
from e3rl.cluster.messages import Hello
from e3rl.cluster.pool import Place, WorkerPool
from e3rl.cluster.server import make_server
from e3rl.cluster.wire import decode, encode
from e3rl.errors import UserError
from e3rl.web.access import Access
from tests.cluster.places import World, ids
from tests.web.running import running

IMAGE = torch.arange(5000, dtype=torch.int64).view(torch.uint8)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_A_CHUNK", 3.0)
    monkeypatch.setattr(module, "SECONDS_TO_MEET", 20.0)
    monkeypatch.setattr(module, "CHUNK", 8192)


class Worker:
    """A worker that keeps what it receives."""

    def __init__(self, change: Callable[[Broadcast], Broadcast] = lambda wanted: wanted) -> None:
        self._audience, self._change = Audience(), change
        self.images: list[Tensor] = []
        self.said: list[str] = []
        self.keys: list[str] = []

    def address(self) -> str:
        return "127.0.0.1"

    def receive_weights(self, body: bytes) -> None:
        wanted = self._change(decode(Broadcast, body))
        self.keys.append(wanted.meeting.key)
        try:
            self.images.append(self._audience.receive(wanted))
        except UserError as error:
            self.said.append(str(error))
            raise


def test_all_receive_the_very_bytes_version_after_version_in_one_group():
    workers, broadcaster = [Worker(), Worker(), Worker()], Broadcaster()
    for version in range(3):
        assert broadcaster.send(version, "name", IMAGE + version, workers) == [True] * 3
    for worker in workers:
        assert len(set(worker.keys)) == 1
        assert all(torch.equal(found, IMAGE + n) for n, found in enumerate(worker.images))
    late = Worker()
    assert broadcaster.send(3, "name", IMAGE, [workers[0], late]) == [True, True]
    assert torch.equal(late.images[0], IMAGE)
    assert late.keys[0] != workers[1].keys[0]
    broadcaster.close_group()


def test_versions_that_cross_are_said_and_the_next_one_comes(monkeypatch: pytest.MonkeyPatch):
    """A worker that was asked to wait for another version takes nothing of the one that comes."""
    old = Worker(lambda w: dataclasses.replace(w, version=5) if w.version == 6 else w)
    broadcaster = Broadcaster()
    began = time.monotonic()
    with contextlib.suppress(BroadcastFailed):  # who left before the trainer was done
        assert broadcaster.send(6, "name", IMAGE, [old]) == [False]
    assert time.monotonic() - began < 30
    assert not old.images
    assert "versions cross: weights of version 5 were announced, and version 6 came" in old.said[0]
    assert broadcaster.send(7, "name", IMAGE, [old]) == [True]
    assert torch.equal(old.images[0], IMAGE)
    broadcaster.close_group()


PROCESS = """
import json, sys, time
import torch
import torch.distributed as dist
from e3rl.cluster.broadcast import Meeting, WeightGroup, _head

meeting = Meeting(**json.loads(sys.argv[2]))
store = None
if meeting.rank == 0:
    store = dist.TCPStore("127.0.0.1", meeting.port, is_master=True, wait_for_workers=False)
group = WeightGroup(meeting, store)
if sys.argv[1] == "begin":
    group._broadcast(_head(1, 40000, "name"))
    group._broadcast(torch.zeros(8192, dtype=torch.uint8))
else:
    group._broadcast(torch.zeros(64, dtype=torch.uint8))
print("inside", flush=True)
time.sleep(60)
"""


def start(what: str, meeting: Meeting) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, what, json.dumps(dataclasses.asdict(meeting))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Dies(Worker):
    """Its process takes the head of an update and is killed then."""

    def receive_weights(self, body: bytes) -> None:
        process = start("receive", decode(Broadcast, body).meeting)
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        process.kill()
        process.wait(10)
        raise ConnectionError("it is gone")


def test_a_worker_that_dies_in_the_middle_ends_the_update_for_all_and_the_next_one_comes(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)  # so that it dies in the middle
    alive, broadcaster = Worker(), Broadcaster()
    began = time.monotonic()
    with pytest.raises(BroadcastFailed, match="has gone, or took nothing for 3 s"):
        broadcaster.send(1, "name", IMAGE, [alive, Dies()])
    assert time.monotonic() - began < 45
    monkeypatch.setattr(module, "CHUNK", 8192)
    alive.images.clear()
    assert broadcaster.send(2, "name", IMAGE, [alive]) == [True]
    assert torch.equal(alive.images[0], IMAGE)
    broadcaster.close_group()


@pytest.mark.parametrize("dies", [False, True], ids=["it hangs", "it dies"])
def test_workers_of_a_trainer_that_does_not_finish_wait_no_longer_than_said(dies: bool):
    """Nothing of the update is used, and another trainer is received after it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = Meeting("127.0.0.1", free.getsockname()[1], "key", 0, 2, "gloo")
    trainer, worker = start("begin", meeting), Worker()
    assert trainer.stdout is not None
    wanted = Broadcast(dataclasses.replace(meeting, rank=1), 1, len(IMAGE), "name")
    said: list[BaseException] = []

    def receive() -> None:
        try:
            worker.receive_weights(encode(wanted))
        except UserError as error:
            said.append(error)

    waiting = threading.Thread(target=receive)
    waiting.start()
    assert trainer.stdout.readline() == "inside\n"
    began = time.monotonic()
    if dies:
        trainer.kill()
    waiting.join(20)
    assert not waiting.is_alive()
    assert time.monotonic() - began < (2.5 if dies else 15)
    trainer.kill()
    trainer.wait(10)
    assert "version 1 were announced, and their trainer has gone or sent nothing for 3 s" in str(said[0])
    assert not worker.images
    broadcaster = Broadcaster()
    assert broadcaster.send(2, "name", IMAGE, [worker]) == [True]
    broadcaster.close_group()


class Shut(Worker):
    """A worker behind a wall: it never comes to the meeting."""

    def receive_weights(self, body: bytes) -> None:
        raise UserError("no such call")


class Seat:
    """A worker's place, as the pool has it."""

    def __init__(self, worker: Worker) -> None:
        self.lock, self.version, self._worker = threading.Lock(), None, worker

    def hearer(self) -> Worker:
        return self._worker


def test_workers_that_can_not_be_met_are_sent_the_weights_from_then_on(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SECONDS_TO_MEET", 1.0)
    notes: list[str] = []
    broadcaster, seat = Broadcaster(notes.append), Seat(Shut())
    for version in (1, 2):
        broadcaster.publish(world.published(version), [seat])
        assert seat.version is None
    assert len(notes) == 1
    assert notes[0].startswith("weights of version 1 could not be broadcast: not all came within 1 s")
    assert notes[0].endswith("each worker is sent them, and those that follow")


def _elsewhere(url: str, sent: list[str]) -> Place:
    """A server that says that it is on another machine; how it gets weights is noted."""
    place = server_place(url, None, 20.0)

    def connect() -> Any:
        connection: Any = place.connect()
        hello, load, receive = connection.hello, connection.load_weights, connection.receive_weights
        connection.hello = lambda: encode(dataclasses.replace(decode(Hello, hello()), node="elsewhere"))
        connection.load_weights = lambda *a: (sent.append("sent"), load(*a))[1]
        connection.receive_weights = lambda *a: (receive(*a), sent.append("broadcast"))[0]
        return connection

    return Place(place.name, connect)


def test_servers_elsewhere_make_the_same_groups_by_weights_that_were_broadcast(world: World):
    """The first version is sent to each, as nobody knew them; those that follow are broadcast, or sent where that fails."""
    expected, sent = ids(world.local()), list[str]()
    with (
        running(make_server(world.worker(), Access("127.0.0.1"), 0, 2**26)) as one,
        running(make_server(world.worker(), Access("127.0.0.1"), 0, 2**26)) as two,
    ):
        places = [_elsewhere(server.url, sent) for server in (one, two)]
        pool = WorkerPool(places, world.terms(), broadcaster=Broadcaster())
        pool.load_weights(world.published(0))
        assert ids(world.run(pool)) == expected
        assert sent == ["sent", "sent"]
        other = {name: p.detach() * 1.5 for name, p in world.policy.trainable()}
        pool.load_weights(world.published(1, other))
        assert sent[2:] == ["broadcast", "broadcast"]
        pool.load_weights(world.published(2, {n: torch.full_like(p, torch.nan) for n, p in other.items()}))
        assert sent[4:] == [], "refused by both: they have those of before"
        pool.load_weights(world.published(0))
        assert ids(world.run(pool)) == expected
        assert sent[4:] == ["broadcast", "broadcast"]
        pool.close()
