"""The load of `benchmarks/serve.py` by a public generator: `vllm bench serve`, inside this process."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

SHORTER_FROM, SHORTER = 100, 2
"""Answers are so many times shorter from so many streams on."""


def available() -> bool:
    """Whether vLLM is in this environment."""
    return importlib.util.find_spec("vllm") is not None


def requests(streams: int) -> int:
    """Of one run: two waves where streams are few."""
    return max(4, 2 * streams) if streams < 64 else streams


def _questions(directory: Path, count: int) -> Path:
    """A file of prompts."""
    draw, path = random.Random(count), directory / f"questions-{count}.jsonl"
    texts = ["".join(draw.choice("0123456789+-*=; ") for _ in range(48)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def measured(url: str, model: Path, extra: dict[str, Any], streams: int, tokens: int) -> dict[str, Any]:
    """The generator's figures of one server at one number of streams, after a request or two that don't count."""
    from vllm.benchmarks.serve import add_cli_args, main

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser
    except ImportError:
        Parser = argparse.ArgumentParser  # type: ignore[misc, assignment]
    parser = Parser()
    add_cli_args(parser)
    tokens = tokens // SHORTER if streams >= SHORTER_FROM else tokens
    options = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": str(model),
        "dataset-name": "custom",  # with "random" it would send a field that not every server takes
        "dataset-path": str(_questions(model.parent, requests(streams))),
        "custom-output-len": tokens,
        "num-prompts": requests(streams),
        "max-concurrency": streams,
        "num-warmups": min(streams, 4),
        "temperature": 1.0,
        "extra-body": json.dumps({"max_tokens": tokens, **extra}),  # what transformers reads
        "percentile-metrics": "ttft,tpot,itl",
        "metric-percentiles": "50,99",
        "seed": 0,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = main(parser.parse_args([*arguments, "--disable-tqdm"]))
    if not found["completed"]:
        print(said.getvalue()[-2000:], file=sys.stderr)
    return {
        "tokens_per_s": round(found["output_throughput"], 1),
        "ttft_ms_median": round(found["median_ttft_ms"], 1),
        "ttft_ms_p99": round(found["p99_ttft_ms"], 1),
        "token_ms_median": round(found["median_tpot_ms"], 1),
        "gap_ms_p99": round(found["p99_itl_ms"], 1),
        "answers": found["completed"],
        "failures": requests(streams) - found["completed"],
    }
