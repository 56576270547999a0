"""Weights through shared memory: whole, of the version that was asked for, or refused with a sentence in bounded time."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from e3rl.cluster.messages import Ask, Hello, Task, decode_answer
from e3rl.cluster.pool import Place, WorkerPool
from e3rl.cluster.wire import decode, encode
from e3rl.errors import UserError
from e3rl.train.checkpoint import LazyTensors
from e3rl.weights.image import checksum, read_image
from e3rl.weights.publish import NotReachable, Offer, Publisher, Receiver, this_node
from tests.cluster.places import Broken, World, ids

pytestmark = pytest.mark.skipif(not this_node(), reason="no process's memory can be opened by another here")
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {
    "a": torch.randn(300, 7, generator=GENERATOR).bfloat16(),
    "b": torch.randn(11, 13, generator=GENERATOR),
    "c": torch.randn(3, generator=GENERATOR).bfloat16(),
}


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher(patience=0.2)
    yield publisher
    publisher.close()


def changed(by: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + by for name, tensor in WEIGHTS.items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_receivers_read_the_very_weights_version_after_version(publisher: Publisher):
    receivers = [Receiver(), Receiver()]
    for version in range(3):
        wanted = changed(version)
        published = publisher.publish(version, WEIGHTS, wanted)
        for receiver in receivers:
            with receiver.taken(published.offer, 1) as image:
                assert equal(read_image(image, published.offer.checksum, WEIGHTS), wanted)
        with published.image() as sent:
            assert equal(load(bytes(sent)), wanted)
    size = published.offer.size
    assert publisher.moved == {"copied": 3 * size, "hashed": 3 * size}  # whatever the number of receivers


def test_float32_weights_are_rounded_to_what_the_receivers_have(publisher: Publisher):
    exact = {name: tensor.float() + 1e-4 for name, tensor in WEIGHTS.items()}
    published = publisher.publish(0, WEIGHTS, exact)
    with Receiver().taken(published.offer, 1) as image:
        assert equal(read_image(image, None, WEIGHTS), {n: t.to(WEIGHTS[n].dtype) for n, t in exact.items()})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("b", float("nan"), "b holds NaN"), ("c", float("inf"), "c holds NaN or inf"), ("a", -float("inf"), "a holds")],
)
def test_weights_that_are_not_finite_are_refused(publisher: Publisher, name: str, value: float, words: str):
    broken = {n: t.clone() for n, t in WEIGHTS.items()}
    broken[name].view(-1)[-1] = value
    published = publisher.publish(0, WEIGHTS, broken)
    with Receiver().taken(published.offer, 1) as image, pytest.raises(UserError, match=words):
        read_image(image, published.offer.checksum, WEIGHTS)


def test_large_numbers_whose_sum_is_infinite_are_weights(publisher: Publisher):
    large = {"w": torch.full((8,), 3e38)}
    published = publisher.publish(0, large, large)
    with Receiver().taken(published.offer, 1) as image:
        assert equal(read_image(image, published.offer.checksum, large), large)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type_s_largest_numbers_are_weights_and_nothing_beyond(publisher: Publisher, kind: torch.dtype):
    most = torch.finfo(kind).max
    edge = torch.tensor([most, -most, torch.finfo(kind).tiny, -0.0, 1.0], dtype=kind)
    for wrong in (None, float("nan"), -float("nan"), float("inf"), -float("inf")):
        values = {"w": edge.repeat(3)}
        if wrong is not None:
            values["w"][7] = wrong
        published = publisher.publish(0, values, values)
        with Receiver().taken(published.offer, 1) as image:
            if wrong is None:
                assert equal(read_image(image, published.offer.checksum, values), values)
            else:
                with pytest.raises(UserError, match="w holds NaN"):
                    read_image(image, published.offer.checksum, values)


@pytest.mark.parametrize("chunk", [None, 64], ids=["one chunk", "chunks across tensors"])
def test_a_single_changed_byte_is_noticed(publisher: Publisher, chunk: int | None, monkeypatch: pytest.MonkeyPatch):
    if chunk:
        monkeypatch.setattr("e3rl.weights.image._CHUNK", chunk)
    exact = {name: tensor.float() if name == "a" else tensor for name, tensor in WEIGHTS.items()}  # one is converted
    published = publisher.publish(0, WEIGHTS, exact)
    assert publisher._memory is not None
    shared = publisher._memory.image
    assert checksum(shared) == published.offer.checksum
    for place in range(70, len(shared), 97) if chunk else (70, 1000, len(shared) - 1):
        shared[place] += 1
        with Receiver().taken(published.offer, 1) as image, pytest.raises(UserError, match="damaged"):
            read_image(image, published.offer.checksum, WEIGHTS)
        shared[place] -= 1
    with Receiver().taken(published.offer, 1) as image:
        assert equal(read_image(image, published.offer.checksum, WEIGHTS), WEIGHTS)


def test_versions_that_cross_are_refused(publisher: Publisher):
    old = publisher.publish(3, WEIGHTS, WEIGHTS)
    new = publisher.publish(4, WEIGHTS, changed())
    receiver = Receiver()
    with pytest.raises(UserError, match="version 3 were offered, and those there are of version 4"):
        receiver.taken(old.offer, 1).__enter__()
    with receiver.taken(new.offer, 1) as image:
        assert equal(read_image(image, new.offer.checksum, WEIGHTS), changed())


@pytest.mark.parametrize("missing", [True, False], ids=["a tensor is missing", "it fails in the middle"])
def test_an_update_that_is_never_finished_is_refused_and_the_next_one_is_not(publisher: Publisher, missing: bool):
    old = publisher.publish(0, WEIGHTS, WEIGHTS)

    def bring(name: str) -> Tensor:
        if name == "c":
            raise MemoryError
        return WEIGHTS[name]

    half = {"b": WEIGHTS["b"]} if missing else LazyTensors(WEIGHTS, bring)
    with pytest.raises(KeyError if missing else MemoryError):
        publisher.publish(1, WEIGHTS, half)
    with pytest.raises(UserError, match="begun and never finished"):
        Receiver().taken(old.offer, 1).__enter__()
    new = publisher.publish(2, WEIGHTS, changed())
    with Receiver().taken(new.offer, 1) as image:
        assert equal(read_image(image, new.offer.checksum, WEIGHTS), changed())


def test_a_reader_keeps_its_version_and_holds_nobody_up(publisher: Publisher):
    """One that does not let go costs the publisher its patience, once, and memory: what it reads stays as it was."""
    old = publisher.publish(0, WEIGHTS, WEIGHTS)
    with Receiver().taken(old.offer, 1) as image:
        began = time.monotonic()
        new = publisher.publish(1, WEIGHTS, changed())
        assert 0.2 <= time.monotonic() - began < 5
        assert equal(read_image(image, old.offer.checksum, WEIGHTS), WEIGHTS)
        with Receiver().taken(new.offer, 1) as other:
            assert equal(read_image(other, new.offer.checksum, WEIGHTS), changed())


def test_a_publisher_that_hangs_in_an_update_is_waited_for_so_long(publisher: Publisher):
    old = publisher.publish(0, WEIGHTS, WEIGHTS)
    inside, go_on = threading.Event(), threading.Event()

    def slow(name: str) -> Tensor:
        inside.set()
        go_on.wait(30)
        return WEIGHTS[name]

    thread = threading.Thread(target=publisher.publish, args=(1, WEIGHTS, LazyTensors(WEIGHTS, slow)))
    thread.start()
    inside.wait(30)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"not finished within 0\.3 s"):
        Receiver().taken(old.offer, 0.3).__enter__()
    assert time.monotonic() - began < 5
    go_on.set()
    thread.join()


def test_what_can_not_be_opened_is_said(publisher: Publisher):
    offer = publisher.publish(0, WEIGHTS, WEIGHTS).offer
    for other in (dataclasses.replace(offer, fd=987654), dataclasses.replace(offer, pid=2**22 + 1)):
        with pytest.raises(NotReachable, match="can't be opened from here"):
            Receiver().taken(other, 1).__enter__()
    with pytest.raises(NotReachable, match="other memory"):
        Receiver().taken(dataclasses.replace(offer, size=offer.size - 8), 1).__enter__()
    other_file = os.memfd_create("something else", os.MFD_ALLOW_SEALING)
    os.ftruncate(other_file, 4096 + offer.size)
    with pytest.raises(NotReachable, match="other memory"):  # it could be cut under who reads it
        Receiver().taken(dataclasses.replace(offer, fd=other_file), 1).__enter__()
    fcntl.fcntl(other_file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(NotReachable, match="no weights"):
        Receiver().taken(dataclasses.replace(offer, fd=other_file), 1).__enter__()
    os.close(other_file)


@pytest.mark.timeout(60)
def test_what_is_no_memory_is_refused_at_once(publisher: Publisher, tmp_path: Path):
    offer = publisher.publish(0, WEIGHTS, WEIGHTS).offer
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "empty").touch()
    file = os.open(tmp_path / "empty", os.O_RDONLY)
    for fd, size in ((pipe, offer.size), (pipe, -4096), (file, -4096), (offer.fd, -4096), (offer.fd, 10**30)):
        with pytest.raises(NotReachable):
            Receiver().taken(dataclasses.replace(offer, fd=fd, size=size), 1).__enter__()
    os.close(pipe)
    os.close(file)


PROCESS = """
import sys, time
import torch
from e3rl.weights.publish import Offer, Publisher, Receiver
from e3rl.train.checkpoint import LazyTensors
like = {"w": torch.zeros(4)}

def waiting(name):
    print("inside", flush=True)
    time.sleep(60)

if sys.argv[1] == "publish":
    publisher = Publisher()
    offer = publisher.publish(0, like, like).offer
    print(offer.pid, offer.fd, offer.size, offer.checksum, flush=True)
    sys.stdin.readline()
    publisher.publish(1, like, LazyTensors(like, waiting))
else:
    offer = Offer(0, *map(int, sys.argv[2:5]), sys.argv[5])
    with Receiver().taken(offer, 5):
        print("inside", flush=True)
        time.sleep(60)
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait(10) == -signal.SIGKILL


def test_a_receiver_that_dies_in_the_middle_of_an_update_holds_nobody_up():
    publisher = Publisher(patience=20)
    like = {"w": torch.zeros(4)}
    offer = publisher.publish(0, like, like).offer
    reader = start("receive", offer.pid, offer.fd, offer.size, offer.checksum)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "inside\n"
    threading.Timer(0.2, reader.kill).start()
    began = time.monotonic()
    new = publisher.publish(1, like, {"w": torch.ones(4)}).offer
    assert time.monotonic() - began < 10
    assert new.fd == offer.fd  # it was waited for, and its lock is gone with it
    reader.wait(10)
    publisher.close()


def test_a_trainer_that_dies_in_the_middle_of_an_update_leaves_no_receiver_waiting():
    trainer, receiver = start("publish"), Receiver()
    assert trainer.stdout is not None
    assert trainer.stdin is not None
    pid, fd, size, named = trainer.stdout.readline().split()
    offer = Offer(0, int(pid), int(fd), int(size), named)
    with receiver.taken(offer, 1) as image:
        assert not read_image(image, named, {"w": torch.zeros(4)})["w"].any()
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "inside\n"
    began, said = time.monotonic(), []

    def take() -> None:
        try:
            receiver.taken(offer, 30).__enter__()
        except UserError as error:
            said.append(str(error))

    waiting = threading.Thread(target=take)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()  # until its lock is gone
    kill(trainer)
    waiting.join(10)
    assert "begun and never finished" in said[0]
    assert time.monotonic() - began < 15
    with pytest.raises(NotReachable):
        receiver.taken(offer, 1).__enter__()


def test_a_worker_takes_what_is_offered_and_keeps_it_where_the_next_is_no_good(world: World):
    worker = world.worker()
    good = world.published(5)
    assert worker.take_weights(encode(good.offer)) == b""
    assert decode(Hello, worker.hello()).policy_version == 5
    name, first = next(iter(world.policy.trainable()))
    broken = {n: torch.full_like(p, torch.nan) if n == name else p.detach() for n, p in world.policy.trainable()}
    other = {"another": first.detach()}
    for version, weights, words in ((6, broken, "NaN"), (7, other, "lack"), (8, {**broken, name: first[:-1]}, "dtype")):
        with pytest.raises(UserError, match=words):
            worker.take_weights(encode(world.published(version, weights).offer))
        assert decode(Hello, worker.hello()).policy_version == 5
    with pytest.raises(UserError, match="versions cross"):
        worker.take_weights(encode(dataclasses.replace(world.published(9).offer, version=10)))
    assert decode(Hello, worker.hello()).policy_version == 5


def test_a_worker_that_fails_in_the_middle_of_an_update_makes_no_group(world: World, monkeypatch: pytest.MonkeyPatch):
    worker = world.worker()
    worker.take_weights(encode(world.published(0).offer))

    def half(weights: object, version: int) -> None:
        raise MemoryError

    monkeypatch.setattr(worker._engine, "load_weights", half)
    with pytest.raises(MemoryError):
        worker.take_weights(encode(world.published(1).offer))
    answer, _ = decode_answer(worker.exchange(encode(Ask("run", world.settings, (Task("p", (1, 2)),), 5.0))))
    assert answer.fault is not None
    assert "it holds None" in answer.fault.message


def test_near_workers_read_and_far_ones_are_sent_the_same(world: World):
    """Near by node; far where the node differs, or where the memory can't be opened after all."""
    ways: list[str] = []

    def connection(name: str, node: str | None = None, obstacle: bytes = b"") -> Place:
        worker = world.worker()
        made = Broken(worker, lambda _, answer: answer())
        hello = decode(Hello, worker.hello())
        made.hello = lambda: encode(dataclasses.replace(hello, node=hello.node if node is None else node))

        def take(offer: bytes) -> bytes:
            ways.append(f"{name} is offered")
            return obstacle or worker.take_weights(offer)

        def send(version: int, weights: memoryview, named: str) -> None:
            ways.append(f"{name} is sent")
            worker.load_weights(version, bytes(weights), named)

        made.take_weights, made.load_weights = take, send
        return Place(name, lambda: made)

    expected = ids(world.local())
    for name, place in {
        "near": connection("near"),
        "far": connection("far", "elsewhere"),
        "unknown": connection("unknown", ""),
        "walled": connection("walled", None, b"not from here"),
    }.items():
        pool = WorkerPool([place], world.terms())
        pool.load_weights(world.published())
        assert ids(world.run(pool)) == expected, name
    assert ways == ["near is offered", "far is sent", "unknown is sent", "walled is offered", "walled is sent"]
