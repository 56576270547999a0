"""One answer at a time, without siblings: thresholds from other problems, against plain decoding and the calmest of several.

    python benchmarks/late_single.py --json out.json          (two minutes on one quiet core)

`e3rl calibrate` gathers what U usually is on problems of the training half; temperature and setting are chosen there as well.
Each held-out problem is then answered several times, one answer by itself each time. Reranking draws as many answers as the
erased tokens would have paid for, and keeps the one of least U.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_erasing import PLAIN, TEMPERATURES, Counts, configured, interval, measured, shown

from e3rl.calibrate import calibrate
from e3rl.config import Config
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.decoding import HALF_EPS, LATE_EPS, SETTINGS
from e3rl.evaluate.evaluation import evaluate
from e3rl.lab.problems import Split, load
from e3rl.models import Policy, load_policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.engines import build_engine
from e3rl.rollout.reference import ReferenceStatistics
from e3rl.train.environment import environment

ERASING = tuple((setting, t) for setting in (LATE_EPS, HALF_EPS) for t in TEMPERATURES)


@dataclass(frozen=True)
class Calibrated:
    """A way to erase and the statistics that stand in for siblings."""

    config: Config
    reference: ReferenceStatistics


def calibrated(policy: Policy, family: str, setting: str, temperature: float, prompts: int) -> Calibrated:
    config = SETTINGS[setting].applied(configured(family, ("", temperature)))
    config = replace(config, rollout=replace(config.rollout, temperature=temperature))
    found = calibrate(policy, family, config, prompts=prompts, target=0.5, kappa0s=())
    return Calibrated(found.config, found.reference)


def answered(policy: Policy, family: str, split: Split, problems: int, way: Calibrated, times: int) -> Counts:
    """Every problem ``times`` times, each answer alone."""
    config = replace(
        way.config, eval=replace(way.config.eval, num_samples=1, temperature=way.config.rollout.temperature)
    )
    sizes = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    prompts = render_prompts(load(family, split, problems), policy.tokenizer, config.data, **sizes)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    columns, tokens = [], 0
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        for seed in range(times):
            seeded = replace(config, run=replace(config.run, seed=seed))
            done = evaluate(engine, prompts, scorer, policy.tokenizer, seeded, erase=True, reference=way.reference)
            columns.append(done.correct_PK[:, 0])
            tokens += done.record()["tokens"]
    correct_PK = np.stack(columns, axis=1)
    return Counts(correct_PK, np.zeros_like(correct_PK, dtype=float), tokens / correct_PK.size)


def compared(policy: Policy, family: str, tuning: int, problems: int, times: int) -> dict[str, Any]:
    """Each kind in the way that is most accurate on the training half."""
    ways = {choice: calibrated(policy, family, *choice, tuning) for choice in ERASING}
    tried = {choice: answered(policy, family, "train", tuning, way, 2) for choice, way in ways.items()}
    erased = max(tried, key=lambda choice: float(tried[choice].avg_P.mean()))
    plain = {t: measured(policy, family, "train", tuning, ("", t), LATE_EPS) for t in TEMPERATURES}
    best = max(plain, key=lambda t: float(plain[t].avg_P.mean()))
    drawn = min(round(tried[erased].tokens / plain[best].tokens), PLAIN)
    calm = max(plain, key=lambda t: float(plain[t].calmest(drawn, 1).avg_P.mean()))

    erasable = answered(policy, family, "heldout", problems, ways[erased], times)
    held_out = {t: measured(policy, family, "heldout", problems, ("", t), LATE_EPS) for t in {best, calm}}
    n = min(round(erasable.tokens / held_out[best].tokens), PLAIN)
    groups = [  # as many answers of n draws each as PLAIN draws allow
        Counts(c.correct_PK[:, i : i + n], c.suspicion_PK[:, i : i + n], c.tokens).calmest(n, 1).avg_P
        for c in (held_out[calm],)
        for i in range(0, PLAIN - n + 1, n)
    ]
    reranked_P = np.mean(groups, axis=0)
    return {
        "chosen": {"plain": best, "erasable": erased, "rerank": calm},
        "drawn": n,
        "tokens": erasable.tokens / held_out[best].tokens,
        "plain": interval(held_out[best].avg_P),
        "erasable": interval(erasable.avg_P),
        "rerank": interval(reranked_P),
        "erasable_plain": interval(erasable.avg_P - held_out[best].avg_P),
        "erasable_rerank": interval(erasable.avg_P - reranked_P),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--families", nargs="+", default=["lab:path:2", "lab:ways:2"])
    parser.add_argument(
        "--tuning", type=int, default=96, help="problems of the training half to calibrate and choose on"
    )
    parser.add_argument("--problems", type=int, default=256, help="held-out problems")
    parser.add_argument("--times", type=int, default=4, help="answers to each, one at a time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(replace(configured(options.families[0], ("", 1.0)).model, path=options.model))
    told = {name: getattr(options, name) for name in ("model", "tuning", "problems", "times")}
    rows: dict[str, Any] = {}
    print("| problems | chosen | tokens × | plain | erasable | calmest of n | erasable − plain | erasable − calmest |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for family in options.families:
        row = rows[family] = compared(policy, family, options.tuning, options.problems, options.times)
        (setting, t), chosen = row["chosen"]["erasable"], row["chosen"]
        cells = (
            f"`{family}`",
            f"T = {chosen['plain']:g}; {setting} at {t:g}; {row['drawn']} at {chosen['rerank']:g}",
            f"{row['tokens']:.2f}",
            *(shown(row[kind]) for kind in ("plain", "erasable", "rerank")),
            *(shown(row[gap], "+") for gap in ("erasable_plain", "erasable_rerank")),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        options.json.write_text(json.dumps({"environment": environment(), **told, "rows": rows}, indent=2), "utf-8")


if __name__ == "__main__":
    main()
