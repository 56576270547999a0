"""What e3rl's own code costs at real sizes, in counts, bytes and CPU time that need no GPU: one figure a key.

python benchmarks/scale.py [KEY ...] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scale_compute import flops_per_param_token, host_reads_in_vllm, host_reads_per_step
from scale_figure import Figure
from scale_groups import SEGMENT_LENGTH, SEGMENTS, SIBLINGS, random_group, tokenizer_and_ids
from scale_memory import plan_error
from scale_precision import grad_error_512, head_grad_error
from scale_ranks import fsdp_roots, gather_bytes_ratio, rank_files, trainer_engines
from scale_start import host_copies
from scale_weights import weights_files, weights_passes, weights_vs_memcpy

from e3rl.cluster.messages import Answer, decode_answer, encode_answer, group_of
from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.rollout.columns import encode
from e3rl.rollout.group import GroupSettings
from e3rl.train.journal import StepJournal
from e3rl.train.ledger import ledger_rows, write_ledger
from e3rl.train.lessons import Lesson, unscored
from e3rl.train.packing import group_sequences
from e3rl.types import Reward, RewardedGroup

ROUNDS = 7


def python_us_per_token() -> Figure:
    """CPU µs that the first rank spends on a token of a remote group: decode and check, journal, ledger."""
    tokenizer, ids = tokenizer_and_ids()
    rng = np.random.default_rng(0)
    groups = [random_group(ids, rng) for _ in range(ROUNDS + 1)]
    rollout = RolloutConfig(num_generations=SIBLINGS, segment_length=SEGMENT_LENGTH, max_segments=SEGMENTS)
    settings = GroupSettings(rollout, ErasureConfig(), seed=0, step=1, policy_version=0)
    rewards = tuple(Reward(float(n % 2), {"math": float(n % 2)}) for n in range(SIBLINGS))
    random_T = torch.from_numpy(rng.random(SEGMENTS * SEGMENT_LENGTH))
    learnt = [
        Lesson(sequence, unscored(sequence), None, random_T, SIBLINGS)
        for sequence in group_sequences([groups[0]], with_erased=False)
    ]
    bodies = [encode_answer(Answer("run", 1), [encode([group])]) for group in groups]
    tokens = sum(t.committed_tokens + t.erased_tokens for t in groups[0].trajectories)
    seconds: dict[str, list[float]] = {"decode": [], "journal": [], "ledger": []}
    with tempfile.TemporaryDirectory() as place:
        journal = StepJournal(Path(place) / "journal", {"step": 1}, print)
        for number, (body, sent) in enumerate(zip(bodies, groups, strict=True)):
            began = time.process_time()
            _, [batch] = decode_answer(body)
            group = group_of(batch, sent.prompt, settings, len(tokenizer))
            decoded = time.process_time()
            journal.add_group(group)
            kept = time.process_time()
            rows = ledger_rows(number, [RewardedGroup(group, rewards)], learnt, tokenizer)
            write_ledger(Path(place), number, rows)
            written = time.process_time()
            if number:  # the first warms up: most pieces of text are new in it
                for name, spent in zip(seconds, (decoded - began, kept - decoded, written - kept), strict=True):
                    seconds[name].append(spent / tokens * 1e6)
        journal.close()
        assert group == groups[-1]
    parts = {name: statistics.median(found) for name, found in seconds.items()}
    return Figure(sum(parts.values()), 1.5, {**parts, "bytes on the wire": len(bodies[0]) / tokens})


KEYS: dict[str, Callable[[], Figure]] = {
    "python_us_per_token": python_us_per_token,
    "gather_bytes_ratio": gather_bytes_ratio,
    "rank_files": rank_files,
    "weights_files": weights_files,
    "weights_passes": weights_passes,
    "weights_vs_memcpy": weights_vs_memcpy,
    "grad_error_512": grad_error_512,
    "head_grad_error": head_grad_error,
    "fsdp_roots": fsdp_roots,
    "plan_error": plan_error,
    "trainer_engines": trainer_engines,
    "host_copies": host_copies,
    "flops_per_param_token": flops_per_param_token,
    "host_reads_per_step": host_reads_per_step,
    "host_reads_in_vllm": host_reads_in_vllm,
}
"""What is measured, by the name it has in the output."""


def main() -> int:
    """Measure, print, and fail where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help=f"what to measure: {', '.join(KEYS)}; default: all")
    parser.add_argument("--json", metavar="OUT", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if unknown := set(options.keys) - set(KEYS):
        parser.error(f"no such key: {', '.join(sorted(unknown))}")
    figures = {name: KEYS[name]() for name in options.keys or KEYS}
    for name, figure in figures.items():
        parts = ", ".join(f"{part} {value:.3g}" for part, value in figure.parts.items())
        verdict = "" if figure.value <= figure.limit else "  TOO MUCH"
        print(f"{name}: {figure.value:.3g} (at most {figure.limit:g}){verdict}; {parts}")
    if options.json:
        found = {name: {"value": f.value, "limit": f.limit, "parts": dict(f.parts)} for name, f in figures.items()}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(any(figure.value > figure.limit for figure in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
