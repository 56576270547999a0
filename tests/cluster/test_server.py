"""Rollout servers: the groups of one process over HTTP, one of them killed; and what is said when a server is not right."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from e3rl.cli.main import main
from e3rl.cluster.client import ServerConnection, server_place
from e3rl.cluster.messages import Ask, Hello, Task, decode_answer
from e3rl.cluster.pool import Place, WorkerLost, WorkerPool
from e3rl.cluster.server import make_server
from e3rl.cluster.wire import decode, encode
from e3rl.config import load_config, to_toml
from e3rl.errors import UserError
from e3rl.web.access import Access
from e3rl.weights.image import checksum
from tests.cluster.places import LONGEST_PROMPT, World, ids
from tests.web.running import running

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    with running(make_server(world.worker(), Access("127.0.0.1", TOKEN), 0, 2**26)) as server:
        yield server.url


def connect(address: str, token: str | None = TOKEN, timeout: float = 10) -> ServerConnection:
    return server_place(address, token, timeout).connect()  # type: ignore[return-value]


def named(weights: bytes | str) -> str:
    body = weights.encode() if isinstance(weights, str) else weights
    return checksum(torch.frombuffer(bytearray(body), dtype=torch.uint8))


def test_a_server_gives_the_groups_of_one_process(world: World, address: str):
    assert ids(world.run(world.pool(server_place(address, TOKEN, 20)))) == ids(world.local())


def test_an_answer_is_not_held_back_by_the_socket(address: str):
    """Headers and body are two writes; with Nagle's algorithm each call on a connection that is kept takes 40 ms and more."""
    connection, seconds = connect(address), []
    for _ in range(20):
        began = time.perf_counter()
        connection.hello()
        seconds.append(time.perf_counter() - began)
    assert min(seconds[10:]) < 0.02


@pytest.fixture
def started(world: World, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(world.config))
    longest = str(LONGEST_PROMPT)
    command = [sys.executable, "-m", "e3rl", "rollout-server", str(recipe), "--port", "0", "--longest-prompt", longest]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    yield server.stdout.readline().split()[0], server
    server.kill()
    server.wait()


def test_a_server_killed_in_the_middle_of_a_segment_changes_no_group(
    world: World, address: str, started: tuple[str, subprocess.Popen]
):
    doomed, process = started
    connection, asked = ServerConnection("127.0.0.1", int(doomed.rpartition(":")[2]), None, 20), threading.Event()

    class Killing:
        hello, load_weights, close = connection.hello, connection.load_weights, connection.close
        take_weights = connection.take_weights

        def exchange(self, body: bytes) -> bytes:
            asked.set()
            threading.Timer(0.02, process.kill).start()
            return connection.exchange(body)

    class Patient(ServerConnection):  # leaves the other some groups, however slowly it starts
        def exchange(self, body: bytes) -> bytes:
            asked.wait(60)
            return super().exchange(body)

    notes: list[str] = []
    port = int(address.rpartition(":")[2])
    good = Place("good", lambda: Patient("127.0.0.1", port, TOKEN, 20))
    pool = WorkerPool([good, Place("doomed", Killing)], world.terms(timeout=90.0), notes.append)
    pool.load_weights(world.published())
    assert ids(world.run(pool)) == ids(world.local())
    assert process.wait(10) == -signal.SIGKILL
    assert "doomed is lost" in notes[0]


def test_a_server_asks_for_its_token(address: str):
    with pytest.raises(UserError, match="refused /hello: not admitted"):
        connect(address, token=None).hello()
    with pytest.raises(UserError, match="refused /exchange"):
        connect(address, token="something-else-entirely").exchange(b"{}")


def _metrics(address: str, token: str = TOKEN) -> tuple[int, dict[str, float]]:
    http = HTTPConnection(address.removeprefix("http://"), timeout=10)
    http.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
    answer = http.getresponse()
    lines = [line.split() for line in answer.read().decode().splitlines() if not line.startswith("#")]
    http.close()
    return answer.status, {name: float(value) for name, value in lines} if answer.status == 200 else {}


def test_an_operator_reads_what_the_worker_has_done(world: World, address: str):
    """The counts are those of the groups that were sent."""
    status, before = _metrics(address)
    assert (status, _metrics(address, "something-else-entirely")[0]) == (200, 403)
    groups = world.run(world.pool(server_place(address, TOKEN, 20)))
    now, trajectories = _metrics(address)[1], [t for g in groups for t in g.trajectories]
    grown = {name: now[name] - before[name] for name in now}
    assert grown["e3rl_groups_total"] == len(groups)
    assert grown["e3rl_segments_total"] == sum(len(t.segments) for t in trajectories)
    assert grown["e3rl_erasures_total"] == sum(len(t.erasures) for t in trajectories) > 0
    assert grown["e3rl_committed_tokens_total"] == sum(t.committed_tokens for t in trajectories)
    assert grown["e3rl_erased_tokens_total"] == sum(t.erased_tokens for t in trajectories)
    ratio = now["e3rl_erased_tokens_total"] / now["e3rl_committed_tokens_total"]
    assert now["e3rl_regeneration_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert (now["e3rl_rows_held"], now["e3rl_siblings_waiting"], now["e3rl_policy_version"]) == (0, 0, 0)


def test_a_server_refuses_what_it_can_not_use(world: World, address: str):
    with pytest.raises(UserError, match="refused /exchange: Ask is"):
        connect(address).exchange(b"{}")
    http = HTTPConnection(address.removeprefix("http://"), timeout=10)
    http.putrequest("POST", "/exchange")
    http.putheader("Authorization", f"Bearer {TOKEN}")
    http.putheader("Content-Length", str(2**40))
    http.endheaders()
    assert http.getresponse().status == 413
    http.close()
    with pytest.raises(UserError, match="arrived damaged"):
        connect(address).load_weights(1, world.weights, named("of other weights"))


def _without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def _with_a_stranger(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "another.weight": torch.zeros(2)}


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The first tensor in another form."""
    return lambda tensors: {name: change(t) if i == 0 else t for i, (name, t) in enumerate(tensors.items())}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: {}, "lack .*46 of 46"),
        (_without_one, "lack .*1 of 46"),
        (_with_a_stranger, "hold strangers: another.weight"),
        (_changed(lambda t: t[:-1].contiguous()), "model.dtype included"),
        (_changed(lambda t: t.bfloat16()), "torch.bfloat16 .* this worker's torch.float32"),
        (_changed(lambda t: torch.full_like(t, float("nan"))), "holds NaN or infinity"),
        (_changed(lambda t: torch.full_like(t, float("inf"))), "holds NaN or infinity"),
    ],
    ids=["none", "one missing", "a stranger", "shape", "dtype", "NaN", "infinite"],
)
def test_weights_that_are_not_whole_are_refused_and_the_version_stays(
    world: World, address: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
):
    connection = connect(address)
    connection.load_weights(3, world.weights, named(world.weights))
    changed = save(change(load(world.weights)))
    with pytest.raises(UserError, match=f"refused /weights.*{words}"):
        connection.load_weights(4, changed, named(changed))
    assert decode(Hello, connection.hello()).policy_version == 3
    with pytest.raises(UserError, match="no safetensors"):
        connection.load_weights(4, b"no weights", named(b"no weights"))
    assert ids(world.run(world.pool(server_place(address, TOKEN, 20)))) == ids(world.local())


def test_weights_that_arrive_by_half_make_no_group(world: World, monkeypatch: pytest.MonkeyPatch):
    worker = world.worker()
    worker.load_weights(0, world.weights)

    def half(weights: object, version: int) -> None:
        raise MemoryError

    monkeypatch.setattr(worker._engine, "load_weights", half)
    with pytest.raises(MemoryError):
        worker.load_weights(1, world.weights)
    assert decode(Hello, worker.hello()).policy_version is None
    task = Task("p", (1, 2))
    answer, _ = decode_answer(worker.exchange(encode(Ask("run", world.settings, (task,), 5.0))))
    assert answer.fault is not None
    assert "it holds None" in answer.fault.message


def test_a_stranger_reaches_neither_body_nor_connection(address: str):
    host, port = address.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((host, int(port))))
        line = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        line.sendall(b"POST /weights?version=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert line.recv(65536).startswith(b"HTTP/1.1 403")
        connect(address).hello()


def test_a_connection_that_was_idle_for_long_is_opened_anew(address: str):
    connection = connect(address)
    connection.hello()
    connection._used -= 31
    connection._http.sock.close()  # as the server does
    assert decode(Hello, connection.hello()).rows == 9


def test_nobody_there_is_said_and_tried_again_before_the_end(world: World):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=r"no rollout worker is left .*can't be reached.*refused"):
        world.run(world.pool(server_place(f"http://127.0.0.1:{port}", None, 2)))


class _Slow(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(1.0)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>It works!</html>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=[_Slow, _Page], ids=["slow", "another program"])
def stranger(request: pytest.FixtureRequest) -> Iterator[tuple[type, str]]:
    server = HTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield request.param, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_slow_server_and_another_program_end_in_a_message(world: World, stranger: tuple[type, str]):
    kind, address = stranger
    message = "did not answer within 0.2 s" if kind is _Slow else "no rollout worker of e3rl: no JSON"
    with pytest.raises(UserError, match=message):
        world.run(world.pool(server_place(address, None, 0.2)))


def test_a_server_with_a_fault_inside_is_lost(address: str, world: World, monkeypatch: pytest.MonkeyPatch):
    def broken(_: bytes) -> bytes:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(world.workers[0], "exchange", broken)
    with pytest.raises(WorkerLost, match="answered 500 to /exchange: RuntimeError: out of memory"):
        connect(address).exchange(b"{}")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:80", "https://host:1", "http://host", "http://host:port", "http://h:1/path"]
)
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(UserError, match=r"rollout\.servers: .* is no address"):
        server_place(address, None, 1)


def test_a_port_that_is_taken_is_a_sentence(world: World):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on 127.0.0.1 port {port}: .*0 takes any free one"):
            make_server(world.worker(), Access("127.0.0.1"), port, 1)


def test_a_server_for_other_machines_needs_a_token(capsys: pytest.CaptureFixture[str]):
    assert main(["rollout-server", "demo", "--host", "0.0.0.0"]) == 2
    assert "set a token" in capsys.readouterr().err


def test_servers_and_workers_together_are_refused():
    with pytest.raises(UserError, match="both set"):
        load_config(None, (), ["rollout.workers=2", 'rollout.servers=["http://a:1"]'])
