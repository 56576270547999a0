"""An upper bound: training on rollouts judged by an oracle of a set AUROC (`e3rl_reproduce.oracle`) against plain GRPO.

    python benchmarks/settle.py --runs DIRECTORY --json out.json

Every arm trains the embedded model, made worse by Gaussian noise of ``--noise`` standard deviations of each weight matrix, so
that it begins at a low success rate; chains have one operation a segment. Arms of a seed have the same weights, prompts and
draws. Each trains ``--steps`` steps; 'equal tokens' is where it had generated as many tokens, erased ones included, as GRPO
in all its steps, on a straight line between two evaluations. Stops by itself after ``--futile`` seeds if no erasing arm is a
point ahead in either.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from e3rl.config import Config, load_config
from e3rl.files import atomic_directory, write_json
from e3rl.models import load_policy
from e3rl.train.listeners import Silent
from e3rl.train.run_directory import continue_or_put_aside, read_lines
from e3rl.train.summary import environment
from e3rl.train.trainer import Trainer
from e3rl.weights.files import save_pretrained

_ERASE = ("rollout.erase=true", "erasure.baseline=static", "erasure.static_baseline=0.5", "erasure.eta=0")
_CONTRAST = ("objective.name=e3rl", "objective.allocation=sequence", "objective.erased=contrast")
_GRPO = "objective.name=grpo"


def arms(aurocs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Overrides of the recipe `lab` by arm. Without contrast the objective is GRPO's, so only the rollouts differ."""
    found: dict[str, tuple[str, ...]] = {"GRPO": (_GRPO, "rollout.erase=false")}
    for name in aurocs:
        judged = (*_ERASE, f"erasure.metric=e3rl_reproduce.oracle:oracle_{name}")
        found[f"oracle {name}, dropped"] = (_GRPO, *judged)
        found[f"oracle {name}, contrast"] = (*_CONTRAST, *judged)
    return found


def weakened(noise: float, directory: Path) -> Path:
    """The embedded model with noise on its weight matrices, the same each time."""
    path = directory / f"weakened-{noise:g}"
    if not path.is_dir():
        policy = load_policy(load_config(overrides=["model.path=lab"]).model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in policy.model.parameters():
                if weight.ndim == 2:
                    weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        with atomic_directory(path) as temporary:
            save_pretrained(policy, temporary, "The embedded model with noise on its weights.\n")
    return path


def configured(options: argparse.Namespace, overrides: Sequence[str], seed: int, name: str) -> Config:
    given = (
        f"model.path={weakened(options.noise, options.runs)}",
        f"data.train={options.data}",
        f"data.eval={options.data}",
        f"run.name={name}",
        f"run.output_dir={options.runs}",
        f"run.seed={seed}",
        f"train.steps={options.steps}",
        f"train.prompts_per_step={options.prompts}",
        f"train.learning_rate={options.learning_rate}",
        f"train.eval_steps={options.eval_steps}",
        "train.minibatches=1",
        f"rollout.segment_length={options.segment_length}",
        f"rollout.max_segments={options.segments}",
        f"eval.limit={options.limit}",
        "eval.num_samples=4",
    )
    return load_config(Path(str(files("e3rl") / "recipes" / "lab.toml")), overrides=[*given, *overrides])


def run_one(config: Config) -> dict[str, Any]:
    """Train unless it is done; the curve of (step, tokens, Avg, Pass), and erased over committed tokens of the first steps."""
    path = Path(config.run.output_dir) / config.run.name
    if not (path / "summary.json").exists():
        Trainer(config, listeners=[Silent()], resume=continue_or_put_aside(config)).train()
    lines = read_lines(path / "metrics.jsonl")
    tokens = {0: 0} | {line["step"]: line["tokens_total"] for line in lines}
    curve = [
        (line["step"], tokens[line["step"]], line["avg@4"], line["pass@4"])
        for line in read_lines(path / "evaluations.jsonl")
    ]
    return {"curve": curve, "tokens": lines[-1]["tokens_total"], "r": mean(line["r"] for line in lines[:4])}


def after(run: Mapping[str, Any], tokens: float = math.inf) -> tuple[float, float]:
    """Avg and Pass when so many tokens were generated, on straight lines between evaluations; at most at the end."""
    _, spent, avg, passed = np.array(run["curve"]).T
    return float(np.interp(tokens, spent, avg)), float(np.interp(tokens, spent, passed))


def told(values: Sequence[float], *, signed: bool = False) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean(values):{'+' if signed else ''}.3f} ± {error:.3f}"


def rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, str]]:
    """Means over seeds with standard errors; differences from GRPO are paired by seed."""
    base, table = found["GRPO"], {}
    for name, runs in found.items():
        pairs = list(zip(runs, base, strict=False))
        steps, level = [after(r) for r, _ in pairs], [after(r, b["tokens"]) for r, b in pairs]
        plain = [after(b)[0] for _, b in pairs]
        table[name] = {
            "Avg before": told([r["curve"][0][2] for r, _ in pairs]),
            "equal steps": told([a for a, _ in steps]),
            "difference": told([a - p for (a, _), p in zip(steps, plain, strict=True)], signed=True),
            "equal tokens": told([a for a, _ in level]),
            "difference, tokens": told([a - p for (a, _), p in zip(level, plain, strict=True)], signed=True),
            "Pass@4, tokens": told([p for _, p in level]),
            "tokens ×": f"{mean(r['tokens'] / b['tokens'] for r, b in pairs):.2f}",
            "r at first": f"{mean(r['r'] for r, _ in pairs):.2f}",
            "seeds": str(len(pairs)),
        }
    return table


def best_gain(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The largest mean difference from GRPO of any erasing arm, at equal tokens or at equal steps."""
    gains = [
        mean(after(r, limit)[0] - after(b)[0] for r, b, limit in zip(runs, found["GRPO"], limits, strict=True))
        for name, runs in found.items()
        if name != "GRPO"
        for limits in ([b["tokens"] for b in found["GRPO"]], [math.inf] * len(runs))
    ]
    return max(gains, default=math.inf)


def markdown(table: Mapping[str, Mapping[str, str]]) -> str:
    columns = list(next(iter(table.values())))
    lines = [f"| arm | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row.values())} |" for name, row in table.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--runs", type=Path, required=True, help="keep the runs here, and reuse those that are complete"
    )
    parser.add_argument("--data", default="lab:chain:4")
    parser.add_argument("--segment-length", type=int, default=8)
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.09)
    parser.add_argument("--aurocs", nargs="*", default=["95"], help="70, 85, 95, perfect")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--futile", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--eval-steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--limit", type=int, default=64, help="held-out problems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for count, seed in enumerate(range(options.first_seed, options.seeds), 1):
        for arm, overrides in arms(options.aurocs).items():
            name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            found.setdefault(arm, []).append(run_one(configured(options, overrides, seed, name)))
            table = rows(found)
            settings = {key: value for key, value in vars(options).items() if key not in ("json", "runs")}
            write_json(options.json, {"environment": environment(), "settings": settings, "rows": table, "runs": found})
        print(f"\n{count} seeds\n\n{markdown(table)}", flush=True)
        if count == options.futile and best_gain(found) < 0.01:
            print(f"futile: the best erasing arm is {100 * best_gain(found):+.1f} points from GRPO", flush=True)
            return


if __name__ == "__main__":
    main()
