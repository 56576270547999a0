"""`e3rl serve lab` under streams for a long time: what its process holds, and whether every row comes back.

python benchmarks/serve_soak.py --minutes 30 --streams 64 --json out.json

A closed loop of streams. Each asks a sum of the lab in a way that is drawn: erasing or plain, one sample or a group of up to
four, with log-probabilities, with a stop string, as a text or as a chat. One request in four is given up after a few events,
by closing its connection. Once a minute all streams leave, and within two seconds (--within, on a machine with other work to do)
every row must be free and no group left.
Fails on rows that stay taken, on an answer with another status than 200, and on memory that grows by more than 1 MB a minute
after the first fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import httpx
except ImportError:
    httpx = None  # type: ignore[assignment]

from serve import Server, started

from e3rl.lab.problems import generate

WARM_UP = 0.2
"""Share of the time in which caches, pools and the allocator fill."""
LARGEST_SLOPE = 1.0
"""MB of resident memory a minute."""
PART_S = 60.0


@dataclass
class Counts:
    """What happened so far."""

    answers: int = 0
    left: int = 0
    tokens: int = 0
    erased: int = 0
    failures: int = 0
    statuses: dict[str, int] = field(default_factory=dict)


def question(draw: random.Random, prompts: list[str]) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    prompt = draw.choice(prompts)
    body: dict[str, Any] = {"model": "lab", "stream": True, "seed": draw.getrandbits(40)}
    body["stream_options"] = {"include_usage": True}
    body["n"] = draw.choice([1, 1, 1, 2, 3, 4])
    body["e3rl"] = {"erase": draw.random() < 0.7}
    if draw.random() < 0.2:
        body["stop"] = [";A:"]
    if draw.random() < 0.3:
        return "/v1/completions", {**body, "prompt": prompt, "logprobs": draw.choice([0, 3])}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}


async def ask(client: httpx.AsyncClient, url: str, draw: random.Random, prompts: list[str], counts: Counts) -> None:
    """One request, to its end or to where the client leaves."""
    path, body = question(draw, prompts)
    leave = draw.randrange(6) if draw.random() < 0.25 else None
    try:
        async with client.stream("POST", url + path, json=body) as answer:
            if answer.status_code != 200:
                counts.failures += 1
                status = str(answer.status_code)
                counts.statuses[status] = counts.statuses.get(status, 0) + 1
                return
            events = 0
            async for line in answer.aiter_lines():
                if leave is not None and events >= leave:
                    counts.left += 1
                    return
                if line.startswith("data: {"):
                    events += 1
                    used = json.loads(line.removeprefix("data: ")).get("usage")
                    if used:
                        counts.tokens += used["completion_tokens"]
                        counts.erased += used["erased_tokens"]
            counts.answers += 1
    except httpx.HTTPError as error:
        counts.failures += 1
        counts.statuses[type(error).__name__] = counts.statuses.get(type(error).__name__, 0) + 1


def held(pid: int) -> dict[str, float]:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "rss_mb": int(status.partition("VmRSS:")[2].split()[0]) / 1024,
        "threads": int(status.partition("Threads:")[2].split()[0]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


async def part(url: str, streams: int, seconds: float, seed: int, prompts: list[str], counts: Counts) -> None:
    """So many streams for so long. Those that are in an answer at the end leave."""

    async def stream(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        async with httpx.AsyncClient(timeout=120) as client:
            while True:
                await ask(client, url, draw, prompts, counts)

    tasks = [asyncio.ensure_future(stream(number)) for number in range(streams)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def freed(url: str, rows: int, within: float) -> float | None:
    """Seconds until every row is free and no group is left; None where it takes longer than ``within``."""
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=30) as client:
        while time.monotonic() < began + within:
            state = (await client.get(f"{url}/health")).json()
            if (state["free_rows"], state["decoding"], state["waiting"]) == (rows, 0, 0):
                return time.monotonic() - began
            await asyncio.sleep(0.02)
    return None


def slope(seen: list[dict[str, float]]) -> float:
    """MB of resident memory a minute, after the warm-up."""
    settled = seen[int(len(seen) * WARM_UP) :]
    return 60 * statistics.linear_regression([s["s"] for s in settled], [s["rss_mb"] for s in settled]).slope


def soak(url: str, pid: int, streams: int, minutes: float, within: float) -> dict[str, Any]:
    """All parts; what was seen."""
    prompts = [str(p.prompt) for p in generate("chain", 3, "heldout", 64)]
    rows = httpx.get(f"{url}/health").json()["free_rows"]
    counts, seen, began = Counts(), list[dict[str, float]](), time.monotonic()
    while time.monotonic() < began + 60 * minutes:
        asyncio.run(part(url, streams, min(PART_S, 60 * minutes), len(seen), prompts, counts))
        back = asyncio.run(freed(url, rows, within))
        if back is None:
            raise SystemExit(f"rows are not given back within {within:g} s: {httpx.get(f'{url}/health').json()}")
        seen.append({"s": time.monotonic() - began, "freed_s": back, **held(pid), "answers": counts.answers})
        print(json.dumps({**seen[-1], "left": counts.left, "failures": counts.failures}), flush=True)
    growth = {kind: seen[-1][kind] - seen[len(seen) // 5][kind] for kind in ("threads", "files")}
    return {
        "minutes": minutes,
        "streams": streams,
        "rows": rows,
        **{k: v for k, v in vars(counts).items() if k != "statuses"},
        "statuses": counts.statuses,
        "slope_mb_per_minute": slope(seen) if len(seen) > 2 else 0.0,
        "slowest_freed_s": max(s["freed_s"] for s in seen),
        "growth": growth,
        "seen": seen,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--within", type=float, default=2, help="seconds in which rows must be free")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if httpx is None:
        raise SystemExit("the load is made by httpx: pip install httpx")
    command = [sys.executable, "-m", "e3rl", "serve", "lab", "--drain", "0"]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        url, pid = stack.enter_context(started(Server("lab", command, "--port"), Path(directory) / "log"))
        found = soak(url, pid, options.streams, options.minutes, options.within)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({k: v for k, v in found.items() if k != "seen"}))
    raise SystemExit(
        found["failures"] > 0 or found["slope_mb_per_minute"] > LARGEST_SLOPE or any(found["growth"].values())
    )


if __name__ == "__main__":
    main()
