"""How much of its time a trainer waits for rollouts, under `rollout.staleness` 0, 1 and 2, and what not waiting gives.

python benchmarks/waiting.py                                         simulated: a paper's step on 32 H100, seconds
python benchmarks/waiting.py --measure --engine vllm --json out.json one rollout server and one trainer here, some minutes

Simulated: some GPUs generate with vLLM and the others train, groups end as the simulator says (`e3rl plan --simulate`), twelve
steps in a row; new weights cost what the simulator says. Measured: the demo, one thread for the server and one for the trainer,
run after run in turn; the first and the last step are left out, since nothing is generated before and after them. Needs an
environment with vLLM (`make test-vllm`) for ``--engine vllm``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rollout_steps import waiting

from e3rl.cli.recipes import find_recipe, find_recipes
from e3rl.config import load_config
from e3rl.plan.simulation import Work, operations, read_context, roofline, simulate_rollouts
from e3rl.train.run_directory import read_lines
from e3rl.train.summary import environment

WAYS = {"0": (0, False), "1": (1, False), "2": (2, True)}
"""By name: `rollout.staleness`, and whether groups are learnt from as they finish."""

PARAMETERS, KV_BYTES = 4e9, 147456
"""Of Qwen3-4B."""
STEPS = 12


def simulated(recipe: str, gpus: int, splits: list[int], erase: float, end: float) -> list[dict[str, Any]]:
    """By number of GPUs that generate and by staleness: share of time waited, seconds a step, throughput over that of 0."""
    config = load_config(find_recipe(recipe), find_recipes(["topologies/32xh100"]), [])
    rollout, groups = config.rollout, config.train.prompts_per_step
    work = Work(
        groups, rollout.num_generations, rollout.segment_length, rollout.max_segments, erase, end, prompt_tokens=256
    )
    length = work.segment_length * work.segments
    costs = roofline(PARAMETERS, KV_BYTES, 256 + read_context(length, "vllm"), operations(config))
    rows, found = max(rollout.max_rows, work.siblings), list[dict[str, Any]]()
    for workers in splits:
        batches = [simulate_rollouts(work, costs, workers, rows, seed) for seed in range(STEPS)]
        trained = sum(b.tokens - b.erased_tokens for b in batches) / STEPS + groups * work.siblings * work.prompt_tokens
        learning = trained * costs.train_token / (gpus - workers) + costs.sync
        times = {name: waiting([b.ends for b in batches], learning / groups, *way) for name, way in WAYS.items()}
        for name, (waits, seconds) in times.items():
            found.append(
                {
                    "generate + train": f"{workers} + {gpus - workers}",
                    "rollouts": sum(b.seconds for b in batches) / STEPS,
                    "training": learning,
                    "staleness": name,
                    "waits": waits,
                    "step": seconds / STEPS,
                    "throughput": times["0"][1] / seconds,
                }
            )
    return found


SETTINGS = ("train.save_steps=0", "eval.limit=1", "eval.num_samples=1", "eval.erasable=false")


@contextmanager
def server(engine: str, directory: Path) -> Iterator[str]:
    """The address of a rollout server for the demo, on one thread."""
    command = [sys.executable, "-m", "e3rl", "rollout-server", "demo", f"rollout.engine={engine}", "--port", "0"]
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen([*command, "--longest-prompt", "64"], stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        address = next((line.split()[0] for line in process.stdout if line.startswith("http")), "")
        if not address:
            raise RuntimeError((directory / "server.log").read_text()[-2000:])
        threading.Thread(target=process.stdout.read, daemon=True).start()  # vLLM's messages
        try:
            yield address
        finally:
            process.terminate()
            process.wait(60)


def trained(address: str, staleness: str, steps: int, directory: Path) -> dict[str, float]:
    """A run's share of time waited, tokens a second and reward, between its first and its last step."""
    name = f"k{staleness}-{len([*directory.iterdir()])}"
    command = [sys.executable, "-m", "e3rl", "train", "demo", f'rollout.servers=["{address}"]', f"run.name={name}"]
    settings = [
        f"rollout.staleness={staleness}",
        "train.importance_correction=segment_truncate",
        f"train.steps={steps}",
    ]
    done = subprocess.run(
        [*command, f"run.output_dir={directory}", *settings, *SETTINGS], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    lines = read_lines(directory / name / "metrics.jsonl")[1:-1]
    waits, all_of_it = (sum(sum(line[key] for key in keys) for line in lines) for keys in (PARTS[:1], PARTS))
    return {
        "waits": waits / all_of_it,
        "tokens_per_second": sum(line["tokens"] for line in lines) / all_of_it,
        "seconds": all_of_it,
        "seconds_train": sum(line["seconds_train"] for line in lines),
        "staleness": sum(line["staleness"] for line in lines) / len(lines),
    }


PARTS = ("seconds_rollout", "seconds_reward", "seconds_train")


def measured(engine: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """The same of real runs: medians of the rounds."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    runs: dict[str, list[Mapping[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder, server(engine, Path(folder)) as address:
        for _ in range(rounds):
            for name, found in runs.items():
                found.append(trained(address, name, steps, Path(folder)))
                print(name, json.dumps(found[-1]), flush=True)
    gains = {
        name: median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(found, runs["0"], strict=True))
        for name, found in runs.items()
    }
    return [
        {"staleness": name, **{key: median(run[key] for run in found) for key in found[0] if key != "staleness"}}
        | {"age": median(run["staleness"] for run in found), "throughput": gains[name]}
        for name, found in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="qwen3-4b")
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--generate", type=int, nargs="+", default=[16, 20, 24, 28], help="GPUs that generate")
    parser.add_argument("--erase", type=float, default=0.1)
    parser.add_argument("--end", type=float, default=0.1)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found = (
        measured(options.engine, options.steps, options.rounds)
        if options.measure
        else simulated(options.recipe, options.gpus, options.generate, options.erase, options.end)
    )
    for row in found:
        print(
            "  ".join(
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": found, "environment": environment()}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
