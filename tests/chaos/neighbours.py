"""A stream must be the same, byte for byte, whatever other clients send meanwhile.

    python -m tests.chaos.neighbours --requests 3000

Victims of each endpoint are answered alone, then again and again while others send numbers at every extreme, random JSON,
bytes that are no request, grammars, tools and token ids made by chance, and hang up in the middle. No answer may have
status 500, and a victim's events, those of each of its samples in order, must be as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import http.client
import itertools
import json
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from e3rl.config import load_config
from e3rl.models import load_policy
from e3rl.serve.service import Service
from e3rl.serve.settings import _ERASURE
from tests.fuzz.test_servers import _FIELDS, HEADERS, PATHS
from tests.serve.conftest import SETTINGS, serving
from tests.serve.test_neighbours import EDGES, EXTREMES, NASTY, SHAPING, raw
from tests.serve.test_server import ADD, CHAT, GENERATE, TEXT
from tests.serve.test_wire import LOOK, TOOLS_TEMPLATE
from tests.train.random_lab import random_lab
from tests.web.running import raw as send

_PLACES = ("/tokenize", "/detokenize", CHAT, TEXT, GENERATE)
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VICTIMS: dict[str, tuple[str, dict[str, Any]]] = {
    "text, erasing": (TEXT, {"prompt": "3", "n": 2, "seed": 9, "max_tokens": 48, "logprobs": 2}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": "1"}], "seed": 3, "max_tokens": 24, "logprobs": True}),
    "chat with tools": (
        CHAT,
        {"messages": [{"role": "user", "content": "1"}], "seed": 4, "max_tokens": 40, "tools": [LOOK], "tool_choice": "required"},
    ),
    "grammar": (TEXT, {"prompt": "2", "seed": 5, "max_tokens": 40, "structured_outputs": {"json": _SCHEMA}}),
    "token ids": (GENERATE, {"token_ids": [7, 8], "sampling_params": {"seed": 6, "max_tokens": 24, "logprobs": 1}}),
}  # fmt: skip
ERASE = {"e3rl": {"segment_length": 4, "baseline": "static", "static_baseline": 4.5}}
_NAMES = re.compile(rb'"(?:id|request_id)": "[^"]*"|"created": \d+')


@dataclass
class Neighbours:
    """What came of the requests."""

    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # a victim was told to come again: the server was full
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        answers = ", ".join(f"{status} {n}" for status, n in sorted(self.statuses.items()))
        return [
            f"neighbours: {self.requests} requests ({answers}); {sum(self.streams.values())} streams beside them, "
            f"{sum(self.streams.values()) - len(self.wrong)} byte for byte as alone; told to come again {self.refused}",
            *self.wrong[:20],
        ]


def _post(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, found


def _victim(name: str) -> tuple[str, bytes]:
    path, body = VICTIMS[name]
    return path, json.dumps({"model": "tiny", "stream": True, **ERASE, **body}).encode()


def stream_of(port: int, name: str) -> tuple[int, dict[int, list[bytes]]]:
    """The status, and the events of each sample but for the answer's own name and the time."""
    path, body = _victim(name)
    status, found = _post(port, path, body)
    events: dict[int, list[bytes]] = {}
    for line in found.split(b"\n\n"):
        index = re.search(rb'"index": (\d+)', line)
        events.setdefault(int(index[1]) if index else -1, []).append(_NAMES.sub(b"", line))
    return status, events


def _value(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value by chance."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(_FIELDS): _value(rng, depth - 1) for _ in range(rng.randrange(4))}
    text = "".join(rng.choices('ab1 {}[]"\\\n€\u202e\x00', k=rng.randrange(8)))
    return (None, rng.random() < 0.5, rng.randrange(-5, 2**70), rng.uniform(-9, 9), text, rng.choice((0, 1, -1)))[kind]


def _numbers(rng: random.Random) -> tuple[str, bytes]:
    own = (*_ERASURE, "top_k", "segment_length")
    theirs = ("temperature", "top_p", "n", "max_tokens", "seed", "stop", *SHAPING)
    extension = rng.random() < 0.5
    return TEXT, raw(rng.choice(own if extension else theirs), rng.choice((*EXTREMES, *EDGES)), extension=extension)


def _json(rng: random.Random) -> tuple[str, bytes]:
    fields = {rng.choice(_FIELDS): _value(rng) for _ in range(rng.randrange(7))}
    return rng.choice(_PLACES), json.dumps({"model": "tiny", "max_tokens": 8, "prompt": "1", **fields}).encode()


def _grammar(rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.1:
        made: Any = rng.choice([n for n in NASTY.values() if "structured_outputs" in n])["structured_outputs"]
    else:
        regex = "".join(rng.choices(("a", "b", "(", ")", "|", "*", "+", "?", "{1,9}", "[a-z]", "\\d", ".", "^"), k=9))
        lark = (
            "start: "
            + " ".join(rng.choices(('"a"', "start", "|", "b", "/x*/", "(", ")", "+"), k=6))
            + '\nb: "c" | start'
        )
        keys = ("type", "properties", "$ref", "anyOf", "items", "enum", "pattern", "minLength", "const", "not")
        schema = {rng.choice(keys): _value(rng) for _ in range(rng.randrange(1, 4))}
        made = rng.choice(({"regex": regex}, {"grammar": lark}, {"json": schema}, {"choice": [regex, lark]}))
    body = {"model": "tiny", "prompt": "1", "max_tokens": 12, "structured_outputs": made}
    return TEXT, json.dumps(body).encode()


def _tools(rng: random.Random) -> tuple[str, bytes]:
    tool = copy.deepcopy(rng.choice((LOOK, ADD)))
    if rng.random() < 0.5:
        tool["function"][rng.choice(("name", "parameters", "strict", "description"))] = _value(rng)
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "look", "arguments": rng.choice(('{"a": 1}', "{", _value(rng)))},
    }
    messages: list[Any] = [{"role": "user", "content": rng.choice(("1", _value(rng)))}]
    if rng.random() < 0.5:
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c", "content": rng.choice(("9", "<tool_call>" * 50))}]
    choice = rng.choice(("auto", "required", "none", {"type": "function", "function": {"name": "look"}}, _value(rng)))
    body = {"model": "tiny", "messages": messages, "tools": [tool], "tool_choice": choice, "max_tokens": 12}
    return rng.choice((CHAT, CHAT, "/tokenize")), json.dumps(body).encode()


def _token_ids(rng: random.Random) -> tuple[str, bytes]:
    ids = rng.choices(range(rng.choice((20, 20, 20, 10**6))), k=rng.choice((1, 5, 100, 400)))
    sampling = {"max_tokens": 8, rng.choice(("top_k", "min_p", "logprobs", "stop_token_ids", "seed")): _value(rng)}
    shapes = (
        (GENERATE, {"token_ids": ids, "sampling_params": sampling}),
        (TEXT, {"model": "tiny", "prompt": [ids, ids[:3]], "max_tokens": 4}),
        ("/detokenize", {"tokens": ids * rng.choice((1, 200))}),
    )
    path, body = rng.choice(shapes)
    return path, json.dumps(body).encode()


BODIES: dict[str, Callable[[random.Random], tuple[str, bytes]]] = {
    "numbers": _numbers,
    "JSON": _json,
    "grammars": _grammar,
    "tools": _tools,
    "token ids": _token_ids,
}


def _no_request(rng: random.Random, port: int) -> str:
    """Bytes that are nearly a request, or nothing like one."""
    method = rng.choice((b"GET", b"POST", b"HEAD", b"TRACE", b"get", b"\x16\x03\x01"))
    lines = [method + b" " + rng.choice(PATHS).encode() + rng.randbytes(rng.randrange(4)) + b" HTTP/1.1"]
    lines += rng.choices(HEADERS, k=rng.randrange(4)) + rng.choice(([], [b"Host: 127.0.0.1"]))
    request = b"\r\n".join(lines) + b"\r\n\r\n" + rng.randbytes(rng.randrange(60))
    answer = send(port, request if rng.random() < 0.8 else rng.randbytes(200))
    return answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "no answer"


def _hang_up(rng: random.Random, port: int) -> str:
    """A long stream is asked for, and the client leaves: at once, or after it has read a little."""
    body = json.dumps({"model": "tiny", "prompt": "1", "n": 4, "max_tokens": 200, "stream": True, **ERASE}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + body[: rng.choice((len(body), len(body) // 2))])
        connection.settimeout(rng.choice((0.001, 0.1)))
        with contextlib.suppress(OSError):
            connection.recv(rng.choice((1, 2000)))
    return "left"


def attack(rng: random.Random, port: int) -> str:
    """Send something; the status that comes back."""
    kind = rng.randrange(len(BODIES) + 2)
    if kind == len(BODIES):
        return _no_request(rng, port)
    if kind == len(BODIES) + 1:
        return _hang_up(rng, port)
    path, body = list(BODIES.values())[kind](rng)
    status, answer = _post(port, path, body)
    if status == 500:
        raise AssertionError(f"{path} {body[:500]!r}: {answer[:300]!r}")
    return str(status)


@contextlib.contextmanager
def tiny_server() -> Iterator[int]:
    """A server of a small random model whose template has tools; its port."""
    config = load_config(None, [], [*SETTINGS, "erasure.baseline=static", f"model.path={random_lab()}"])
    policy = load_policy(config.model)
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = TOOLS_TEMPLATE
    service = Service(replace(policy, tokenizer=tokenizer), config, None, name="tiny", max_length=256, queue_limit=64)
    with serving(service) as address:
        yield int(address.rpartition(":")[2])
    service.close()


def try_neighbours(requests: int, seed: int = 0, attackers: int = 3) -> Neighbours:
    """So many requests, by some clients at a time, beside the victims' streams, one after the other."""
    found, numbers, lock = Neighbours(), itertools.count(), threading.Lock()
    with tiny_server() as port:
        alone = {name: stream_of(port, name) for name in VICTIMS}
        found.wrong += [f"{name} alone: status {status}" for name, (status, _) in alone.items() if status != 200]

        def work() -> None:
            while (number := next(numbers)) < requests:
                try:
                    status = attack(random.Random(f"{seed}/{number}"), port)
                except Exception as error:
                    status = "failed"
                    found.wrong.append(f"request {number}: {error!r}")
                with lock:
                    found.requests += 1
                    found.statuses[status] += 1

        threads = [threading.Thread(target=work) for _ in range(attackers)]
        for thread in threads:
            thread.start()
        for name in itertools.cycle(VICTIMS):
            status, events = stream_of(port, name)
            if status in (429, 503):
                found.refused += 1
            else:
                found.streams[name] += 1
                if (status, events) != alone[name]:
                    found.wrong.append(
                        f"{name} (after {found.requests} requests): {status} {events} was {alone[name]}"[:3000]
                    )
            if not any(thread.is_alive() for thread in threads):
                break
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = try_neighbours(options.requests, options.seed)
    print("\n".join(found.lines()))
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
