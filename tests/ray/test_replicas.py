"""`e3rl serve --replicas`: two copies answer as one server does, and go on where one is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

PLAIN = {"e3rl": {"erase": False, "segment_length": 4}}


@pytest.fixture(scope="module")
def copies() -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    pytest.importorskip("ray.serve")
    command = [sys.executable, "-m", "e3rl", "serve", "lab", "--replicas", "2", "--port", "0", "--max-length", "256"]
    process = subprocess.Popen([*command, "rollout.max_rows=8"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = next(found[0] for line in process.stdout if (found := re.match(r"http://\S+/v1", line)))
    yield process, openai.OpenAI(base_url=url, api_key="none", max_retries=4)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def answer(client: openai.OpenAI, seed: int) -> str:
    chosen = client.completions.create(
        model="lab", prompt="Q: 7 + 2 * 3 = ?", seed=seed, max_tokens=24, extra_body=PLAIN
    )
    return chosen.choices[0].text


def pids(ancestor: int) -> set[int]:
    """The processes of copies that descend from ``ancestor``."""
    parents, copies = {}, set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            if Path(f"/proc/{entry}/cmdline").read_bytes().startswith(b"ray::ServeReplica:e3rl"):
                copies.add(int(entry))

    def descends(pid: int) -> bool:
        return pid == ancestor or (pid in parents and descends(parents[pid]))

    return {pid for pid in copies if descends(pid)}


def test_all_copies_answer_alike(copies: tuple[subprocess.Popen[str], openai.OpenAI]):
    process, client = copies
    assert len(pids(process.pid)) == 2
    with ThreadPoolExecutor(8) as together:
        answers = list(together.map(lambda i: (i % 4, answer(client, i % 4)), range(32)))
    assert len(set(answers)) == 4  # one text a seed, whichever copy it came from
    assert len({text for _, text in answers}) > 1


def test_a_stream_comes_through(copies: tuple[subprocess.Popen[str], openai.OpenAI]):
    _, client = copies
    parts = client.completions.create(
        model="lab", prompt="Q: 7 + 2 * 3 = ?", seed=1, max_tokens=24, extra_body=PLAIN, stream=True
    )
    texts = [part.choices[0].text for part in parts]
    assert len(texts) > 1
    assert "".join(texts) == answer(client, 1)


def test_a_killed_copy_is_replaced_and_requests_go_on(copies: tuple[subprocess.Popen[str], openai.OpenAI]):
    process, client = copies
    before, expected = pids(process.pid), answer(client, 2)
    os.kill(min(before), signal.SIGKILL)
    assert [answer(client, 2) for _ in range(8)] == [expected] * 8
    deadline = time.monotonic() + 120
    while len(pids(process.pid) - before) < 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(pids(process.pid) - before) == 1
    assert answer(client, 2) == expected
