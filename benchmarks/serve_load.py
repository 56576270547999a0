"""The load of `benchmarks/serve.py` by a public generator: `vllm bench serve`, inside this process."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import statistics
import sys
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

SHORTER_FROM, SHORTER = 100, 2
"""Answers are so many times shorter from so many streams on."""


@dataclass
class Load:
    """What some streams measured in one run."""

    tokens: int = 0
    erased: int = 0
    answers: int = 0
    failures: int = 0
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)  # seconds a token of each answer, behind the first

    def figures(self, seconds: float) -> dict[str, Any]:
        """What goes into the table."""

        def at(values: list[float], share: float) -> float | None:
            ordered = sorted(values)
            return round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1) if ordered else None

        return {
            "tokens_per_s": round(self.tokens / seconds, 1),
            "ttft_ms_median": at(self.firsts, 0.5),
            "ttft_ms_p99": at(self.firsts, 0.99),
            "gap_ms_p99": at(self.gaps, 0.99),
            **({"token_ms_median": round(1000 * statistics.median(self.paces), 1)} if self.paces else {}),
            "events": len(self.firsts) + len(self.gaps),
            "answers": self.answers,
            "failures": self.failures,
        }


def available() -> bool:
    """Whether vLLM is in this environment."""
    return importlib.util.find_spec("vllm") is not None


def requests(streams: int) -> int:
    """Of one run: two waves where streams are few."""
    return max(16, 2 * streams) if streams < 64 else streams


def _questions(directory: Path, count: int) -> Path:
    """A file of prompts."""
    draw, path = random.Random(count), directory / f"questions-{count}.jsonl"
    texts = ["".join(draw.choice("0123456789+-*=; ") for _ in range(48)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def measured(
    url: str, model: Path, extra: dict[str, Any], streams: int, tokens: int, before: int
) -> tuple[Load, float]:
    """The generator's times of one server at one number of streams, after a few requests that don't count; and its seconds.

    Its own sums are not used: it takes the first event for the first token, though ``before`` events come sooner, and counts
    a prompt that is sent back as tokens of the answer.
    """
    from vllm.benchmarks.serve import add_cli_args, main

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser as Parser
    except ImportError:
        Parser = argparse.ArgumentParser  # type: ignore[misc, assignment]
    parser = Parser()
    add_cli_args(parser)
    tokens = tokens // SHORTER if streams >= SHORTER_FROM else tokens
    options: dict[str, Any] = {
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
        "seed": 0,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = main(parser.parse_args([*arguments, "--disable-tqdm", "--save-detailed"]))
    if not found["completed"]:
        print(said.getvalue()[-2000:], file=sys.stderr)
    load = Load(answers=found["completed"], failures=requests(streams) - found["completed"])
    for first, gaps, length in zip(found["ttfts"], found["itls"], found["output_lens"], strict=True):
        times = list(accumulate(gaps, initial=first))[before:]
        if not times or not length:  # it failed
            continue
        drawn = min(length, tokens)
        load.tokens += drawn
        load.firsts.append(times[0])
        load.gaps += gaps[before:]
        load.paces.append((times[-1] - times[0]) / max(drawn - 1, 1))
    return load, found["duration"]
