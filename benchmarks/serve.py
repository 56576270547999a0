"""`e3rl serve` under load, beside `transformers serve` and `vllm serve` in the same run.

python benchmarks/serve.py --json out.json        (six minutes on two quiet cores)

Every server in turn at every number of streams, with the same model (random weights) and answer lengths. The load is made by
`vllm bench serve` where vLLM is installed: run this with the python of such an environment. Else (or with --own) it is a
closed loop of our own: each stream asks again as soon as its answer has ended, for a fixed time. Peers that are not installed
are left out and named. Figures of one machine say nothing of another: compare the columns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import httpx
except ImportError:
    httpx = None  # type: ignore[assignment]

from serve_load import Load, available, measured

PLAIN = {"e3rl": {"erase": False, "segment_length": 8}}
ERASING = {"e3rl": {"erase": True, "segment_length": 8, "baseline": "static", "static_baseline": 100.0}}
START_S = 600.0
VOCABULARY = 8192
"""So many that the end is hardly ever drawn from random weights, and that each token has a text of its own."""


@dataclass(frozen=True)
class Server:
    """A server's command, which gets the port appended to ``port_option``, and what is asked of it beside OpenAI's fields."""

    name: str
    command: list[str]
    port_option: str
    extra: dict[str, Any] = field(default_factory=dict)


def servers(model: Path, rows: int, vllm: str | None) -> tuple[list[Server], list[str]]:
    """Those that can be run here, and those that can't."""
    python = sys.executable
    ours = [python, "-m", "e3rl", "serve", str(model), "--name", str(model), "--max-length", "512", "--drain", "0"]
    ours += [f"rollout.max_rows={rows}", f"rollout.cache_rows={rows}"]
    found = [
        Server("e3rl, plain", ours, "--port", PLAIN),
        Server("e3rl, judged", ours, "--port", ERASING),
    ]
    missing = []
    if importlib.util.find_spec("fastapi"):
        peer = [python, "-m", "transformers.cli.transformers", "serve", str(model), "--device", "cpu"]
        batching = ["--continuous-batching", "--cb-num-blocks", str(rows * 16), "--cb-block-size", "32"]
        found.append(Server("transformers", [*peer, *batching, "--cb-max-batch-tokens", "512"], "--port"))
    else:
        missing.append("transformers serve (pip install fastapi)")
    limits = ["--max-model-len", "512", "--max-num-seqs", str(rows), "--dtype", "float32"]
    if vllm:
        found.append(Server("vllm", [vllm, "serve", str(model), *limits], "--port"))
    elif available():
        peer = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]  # what `vllm serve` starts
        found.append(Server("vllm", [*peer, *limits], "--port"))
    else:
        missing.append("vllm serve (name its command with --vllm)")
    return found, missing


def make_model(path: Path, width: int, layers: int) -> None:
    """A model of random weights with the lab's tokenizer. Answers hardly ever end before their limit."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from e3rl.lab.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(512)
    tokenizer.add_tokens([f" w{i}" for i in range(VOCABULARY - len(tokenizer))])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(width // 64, 1),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextlib.contextmanager
def started(server: Server, log: Path) -> Iterator[tuple[str, int]]:
    """The address of the running server, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out, subprocess.Popen(
        [*server.command, server.port_option, str(port)], stdout=out, stderr=out, env=env, start_new_session=True
    ) as process:  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{server.name} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def events_before(url: str, model: Path, extra: dict[str, Any]) -> int:
    """Events that a server sends before the first token: the role, or the prompt again (`transformers serve`)."""
    body = {"model": str(model), "max_tokens": 1, "stream": True, "temperature": 1.0, **extra}
    body["messages"] = [{"role": "user", "content": "12+34="}]
    lines = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START_S).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    texts = [(c["choices"][0].get("delta") or {}).get("content") for c in chunks if c.get("choices")]
    return max(index for index, text in enumerate(texts) if text)


async def stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], load: Load, until: float, before: int
) -> None:
    """Ask until the time is over; an answer in progress then is waited for and counts for what came in time."""
    draw = random.Random(body.pop("number"))
    while time.monotonic() < until:
        content = "".join(draw.choice("0123456789+-*=; ") for _ in range(48))
        asked = {**body, "messages": [{"role": "user", "content": content}]}
        began = last = time.monotonic()
        seen = 0
        try:
            async with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as answer:
                if answer.status_code != 200:
                    load.failures += 1
                    await asyncio.sleep(0.2)
                    continue
                async for line in answer.aiter_lines():
                    now = time.monotonic()
                    if now > until:
                        return
                    if not line.startswith("data: {"):
                        continue
                    seen += 1
                    if seen <= before:
                        continue
                    last = _note(json.loads(line.removeprefix("data: ")), load, began, last, now)
        except httpx.HTTPError:
            load.failures += 1


def _note(chunk: dict[str, Any], load: Load, began: float, last: float, now: float) -> float:
    """Count an event; when the stream's latest tokens came."""
    if not chunk.get("choices"):
        load.erased += (chunk.get("usage") or {}).get("erased_tokens", 0)
        return last
    choice = chunk["choices"][0]
    load.answers += choice.get("finish_reason") is not None
    text = (choice.get("delta") or {}).get("content")
    if not text:
        return last
    load.tokens += (choice.get("e3rl") or {}).get("tokens", 1)
    (load.firsts if last == began else load.gaps).append(now - last)
    return now


async def measure(
    url: str, server: Server, model: Path, streams: int, tokens: int, seconds: float, before: int
) -> Load:
    """One server at one number of streams, after a short warm-up that doesn't count."""
    common = {"model": str(model), "max_tokens": tokens, "stream": True, "temperature": 1.0, **server.extra}
    common["stream_options"] = {"include_usage": True}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        for load, span in ((Load(), min(3.0, seconds)), (Load(), seconds)):
            until = time.monotonic() + span
            bodies = [{**common, "number": number} for number in range(streams)]
            await asyncio.gather(*(stream(client, url, body, load, until, before) for body in bodies))
    return load


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown. Throughput beside transformers' and vLLM's at the same number of streams."""
    lines = [
        "| streams | server | tokens/s | × transformers | × vllm | first text ms, median (p99) | a token ms | gap ms, p99 "
        "| failures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    speeds = {(r["streams"], r["server"]): r["tokens_per_s"] for r in rows}
    for r in sorted(rows, key=lambda r: r["streams"]):
        first = f"{r['ttft_ms_median']} ({r['ttft_ms_p99']})"
        peers = [speeds.get((r["streams"], name)) for name in ("transformers", "vllm")]
        ratios = [f"{r['tokens_per_s'] / peer:.2f}" if peer else "" for peer in peers]
        cells = [r["streams"], r["server"], r["tokens_per_s"], *ratios, first, r.get("token_ms_median", "")]
        lines.append("| " + " | ".join(map(str, [*cells, r["gap_ms_p99"], r["failures"]])) + " |")
    return "\n".join(lines)


def run(server: Server, url: str, model: Path, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one server at one number of streams."""
    before = events_before(url, model, server.extra)
    if options.own:
        seconds = options.seconds
        load = asyncio.run(measure(url, server, model, streams, options.tokens, seconds, before))
    else:
        load, seconds = measured(url, model, server.extra, streams, options.tokens, before)
    return {"server": server.name, "streams": streams, **load.figures(seconds)}


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,8,64,200", help="numbers of streams")
    parser.add_argument("--own", action="store_true", help="our own closed loop also where vLLM is installed")
    parser.add_argument("--seconds", type=float, default=20, help="of each run of our own loop")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer; from 100 streams on half of it")
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded together")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vllm", help="the vllm command of another environment")
    parser.add_argument("--only", help="servers whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    options.own = options.own or not available()
    return options


def main() -> None:
    """Start every server in turn, and measure it."""
    options = read_options()
    if httpx is None:
        raise SystemExit("servers are waited for, and our own load is made, by httpx: pip install httpx")
    print("load by", "our own loop" if options.own else "vllm bench serve", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        make_model(model, options.width, options.layers)
        found, missing = servers(model, options.rows, options.vllm)
        for name in missing:
            print(f"left out: {name}", file=sys.stderr)
        for server in (s for s in found if not options.only or options.only in s.name):
            with started(server, Path(directory) / "log") as (url, _):
                for streams in map(int, options.streams.split(",")):
                    rows.append(run(server, url, model, streams, options))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
