"""Avg@k and Pass@k of a model on lab problems, by plain sampling.

Run ``python -m e3rl.lab.measure MODEL lab:chain:1-5``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e3rl.lab.problems import generate, grade, parse
from e3rl.types import Problem


@dataclass(frozen=True, slots=True)
class Score:
    """Share of right responses, and share of problems with at least one right response."""

    average: float
    passed: float


def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    samples: int,
    max_new_tokens: int,
    batch: int = 64,
    **options: Any,
) -> list[list[str]]:
    """``samples`` responses to each problem; ``options`` go to ``generate``."""
    turns = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    texts = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    responses: list[list[str]] = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        out = model.generate(
            **inputs, do_sample=True, num_return_sequences=samples, max_new_tokens=max_new_tokens, **options
        )
        decoded = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses += [decoded[i : i + samples] for i in range(0, len(decoded), samples)]
    return responses


def score(problems: Sequence[Problem], responses: Sequence[Sequence[str]]) -> Score:
    """Avg@k and Pass@k of the responses."""
    right = [[grade(p, text) for text in texts] for p, texts in zip(problems, responses, strict=True)]
    return Score(
        average=sum(sum(row) / len(row) for row in right) / len(right),
        passed=sum(any(row) for row in right) / len(right),
    )


def main() -> None:
    """Print a table, one line for each level."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m e3rl.lab.measure", description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face model directory")
    parser.add_argument("names", nargs="+", help="lab problems, such as lab:chain:1-5")
    parser.add_argument("--problems", type=int, default=128, help="held-out problems a level")
    parser.add_argument("--samples", type=int, default=8, help="responses a problem")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    k = options.samples
    print(f"| problems | Avg@{k} | Pass@{k} | seconds |\n|---|---|---|---|")
    for selection in map(parse, options.names):
        for level in selection.levels:
            started = time.perf_counter()
            torch.manual_seed(options.seed)
            problems = generate(selection.family, level, "heldout", options.problems)
            result = score(problems, sample(model, tokenizer, problems, k, options.max_new_tokens, **sampling))
            seconds = time.perf_counter() - started
            name = f"lab:{selection.family}:{level}"
            print(f"| `{name}` | {result.average:.3f} | {result.passed:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
