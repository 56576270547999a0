"""Is `e3rl plan --simulate` right? Rollouts by 1, 2 and 4 rollout servers on this machine against the simulated time.

    python benchmarks/scaling.py [--groups 32] [--rounds 3]

Costs are measured on one engine in this process: a decode step by its rows, a prompt, and, with segments of two tokens,
what a candidate costs beside its steps. Every server is a process with one thread; more servers than cores share them,
which the simulation is told as slower steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from e3rl.cluster.client import server_place
from e3rl.cluster.pool import Terms, WorkerPool
from e3rl.config import Config, load_config, to_toml
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Sampling
from e3rl.models import Policy, load_policy
from e3rl.plan.simulation import Costs, Work, simulate_rollouts
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.types import Draw, Prompt
from e3rl.weights.model import architecture
from e3rl.weights.publish import Published, Publisher

OVERRIDES = (
    "model.path=lab",
    "data.train=lab:chain:3",
    "rollout.num_generations=4",
    "rollout.segment_length=12",
    "rollout.max_segments=8",
    "rollout.max_rows=16",
    "rollout.cache_rows=16",
    "erasure.kappa0=1.4",
)


def measured_step(policy: Policy, config: Config, prompt: Prompt, rows: int, tokens: int = 64) -> float:
    """Seconds of a decode step with so many rows."""
    engine = build_engine(config.rollout, policy.model, (), len(prompt.ids))
    handles = [engine.prefill(prompt.ids, 1)[0] for _ in range(rows)]
    for row in handles:
        engine.extend(row, tokens, Draw(0, 0, "p", row, 0, 0), Sampling())
    began, delivered = time.perf_counter(), 0
    while delivered < rows:
        delivered += len(engine.poll())
    return (time.perf_counter() - began) / tokens


def measured_candidate(policy: Policy, config: Config, prompts: Sequence[Prompt], costs: Costs) -> float:
    """Seconds of a candidate beside its decode steps and prompts: a rollout with segments of two tokens."""
    short = replace(config.rollout, segment_length=2)
    engine = build_engine(short, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    settings = GroupSettings(short, config.erasure, seed=1, step=1)
    list(run_groups(engine, prompts[:4], settings))  # warms up
    began = time.perf_counter()
    groups = list(run_groups(engine, prompts, replace(settings, step=2)))
    seconds = time.perf_counter() - began
    free = replace(work_of(config, groups, prompts), segment_length=2)
    expected = [simulate_rollouts(free, costs, 1, short.cache_rows, seed) for seed in range(5)]
    candidates = statistics.median(found.tokens / 2 for found in expected)
    return max(0.0, seconds - statistics.median(found.seconds for found in expected)) / candidates


def fitted(policy: Policy, config: Config, prompts: Sequence[Prompt]) -> Costs:
    """A step's fixed part and its part by rows, from 1 row and from as many as there are; and a prompt's time."""
    most = config.rollout.max_rows
    for rows in (1, most):
        measured_step(policy, config, prompts[0], rows, 8)  # warm up
    one, many = (min(measured_step(policy, config, prompts[0], rows) for _ in range(3)) for rows in (1, most))
    row = max(0.0, (many - one) / (most - 1))
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, len(prompts[0].ids))
    began = time.perf_counter()
    for _ in range(10):
        for handle in engine.prefill(prompts[0].ids, config.rollout.num_generations):
            engine.release(handle)
    prompt = (time.perf_counter() - began) / 10
    costs = Costs(step=one - row, row=row, prompt=prompt, train_token=0.0, sync=0.0)
    return replace(costs, candidate=measured_candidate(policy, config, prompts, costs))


def servers(config: Config, number: int, directory: Path) -> list[tuple[str, subprocess.Popen]]:
    """Rollout servers in processes of one thread each."""
    recipe = directory / "recipe.toml"
    recipe.write_text(to_toml(config))
    command = [sys.executable, "-m", "e3rl", "rollout-server", str(recipe), "--port", "0", "--longest-prompt", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(number)]
    return [(server.stdout.readline().split()[0], server) for server in started if server.stdout]


def work_of(config: Config, groups: Sequence, prompts: Sequence[Prompt]) -> Work:
    """What was generated, as the chances that the simulation draws from."""
    stats = summarise(groups)
    segments = sum(len(t.segments) for g in groups for t in g.trajectories)
    tokens = stats.generated_tokens / stats.candidates
    return Work(
        groups=len(prompts),
        siblings=config.rollout.num_generations,
        segment_length=max(1, round(tokens)),
        segments=config.rollout.max_segments,
        erase=stats.erase_rate,
        end=stats.stopped / segments,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(None, (), OVERRIDES)
    policy = load_policy(config.model)
    problems = load_problems(config.data.train, config=config.data, split="train")[: options.groups]
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    prompts = render_prompts(problems, policy.tokenizer, config.data, **limits)
    costs = fitted(policy, config, prompts)
    print(
        f"measured: step {1e3 * costs.step:.2f} ms + {1e3 * costs.row:.3f} ms a row; prompt {1e3 * costs.prompt:.1f} ms; "
        f"candidate {1e3 * costs.candidate:.2f} ms"
    )
    terms = Terms(
        architecture(policy.model),
        policy.model.get_input_embeddings().weight.shape[0],
        max(len(p.ids) for p in prompts) + config.rollout.completion_limit,
        60.0,
    )
    trained = dict(policy.trainable())
    weights = Publisher().publish(0, trained, trained)
    with tempfile.TemporaryDirectory() as directory:
        started = servers(config, 4, Path(directory))
        try:
            for number in (1, 2, 4):
                report(config, prompts, terms, weights, [address for address, _ in started[:number]], costs, options)
        finally:
            for _, server in started:
                server.kill()
                server.wait()


def report(
    config: Config,
    prompts: Sequence[Prompt],
    terms: Terms,
    weights: Published,
    addresses: Sequence[str],
    costs: Costs,
    options: argparse.Namespace,
) -> None:
    """One line: measured and simulated seconds with these servers."""
    pool = WorkerPool([server_place(address, None, 60.0) for address in addresses], terms)
    pool.load_weights(weights)
    settings = GroupSettings(config.rollout, config.erasure, seed=1, step=1, policy_version=0)
    groups = list(pool.run(prompts[: len(addresses)], settings, lambda: None))  # connects, loads, warms up
    taken = []
    for step in range(1, options.rounds + 1):
        began = time.perf_counter()
        groups = list(pool.run(prompts, replace(settings, step=step), lambda: None))
        taken.append(time.perf_counter() - began)
    workers, cores = len(addresses), os.cpu_count() or 1
    slower = max(1.0, workers / cores)
    times = {name: slower * getattr(costs, name) for name in ("step", "row", "prompt", "candidate")}
    here = replace(costs, **times)
    work = work_of(config, groups, prompts)
    simulated = [simulate_rollouts(work, here, workers, config.rollout.cache_rows, seed).seconds for seed in range(5)]
    measured, expected = statistics.median(taken), statistics.median(simulated)
    tokens = summarise(groups).generated_tokens
    print(
        f"{workers} workers: measured {measured:.2f} s ({tokens / measured:.0f} tokens/s), simulated {expected:.2f} s, "
        f"ratio {expected / measured:.2f}; erase rate {work.erase:.3f}, candidates of {work.segment_length} tokens"
    )
    pool.close()


if __name__ == "__main__":
    main()
