"""What the journal of rollouts costs: the same rollout with and without it, interleaved, and its bytes per token.

python benchmarks/journal.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from e3rl.config import load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.models import load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.journal import StepJournal

ROUNDS = 3
SETTINGS = ("model.path=lab", "data.train=lab:chain", "rollout.segment_length=12", "rollout.max_segments=5")


def main() -> None:
    """Print the medians."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    config = load_config(None, [], SETTINGS)
    policy = load_policy(config.model)
    problems = load_problems(config.data.train, config=config.data, split="train")[:16]
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    prompts = render_prompts(problems, policy.tokenizer, config.data, **limits)
    rollout = dataclasses.replace(config.rollout, max_rows=128, cache_rows=128)
    engine = build_engine(rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    seconds: dict[str, list[float]] = {"plain": [], "journal": []}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(ROUNDS + 1):
            for name in seconds:
                began, journal = time.process_time(), None
                if name == "journal":
                    journal = StepJournal(Path(directory) / f"{number}", {"step": 1}, print)
                settings = GroupSettings(rollout, config.erasure, seed=0, step=1)
                groups = list(run_groups(engine, prompts, settings, memory=journal))
                if number:  # the first round warms up
                    seconds[name].append(time.process_time() - began)
        size = (Path(directory) / "1").stat().st_size
    tokens = sum(t.committed_tokens + t.erased_tokens for g in groups for t in g.trajectories)
    plain, journaled = (statistics.median(seconds[name]) for name in ("plain", "journal"))
    print(f"{tokens} tokens: {plain:.3f} CPU seconds without, {journaled:.3f} with the journal ({journaled / plain - 1:+.1%}), "
          f"{size / tokens:.0f} bytes a token")  # fmt: skip


if __name__ == "__main__":
    main()
