"""One answer at a time, without siblings: thresholds from other problems, against plain decoding and the calmest of several.

    python benchmarks/late_single.py --json out.json          (two minutes on one quiet core)

`e3rl calibrate` gathers what U usually is on problems of the training half; temperature and setting are chosen there as well.
Each held-out problem is then answered several times, one answer by itself each time. Reranking draws as many answers as the
erased tokens would have paid for, and keeps the one of least U.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from late_erasing import PLAIN, TEMPERATURES, Counts, configured, evaluated, interval, measured, shown
from late_variants import arguments

from e3rl.config import Config
from e3rl.diagnose.decoding import HALF_EPS, LATE_EPS, SETTINGS
from e3rl.lab.problems import Split
from e3rl.models import Policy, load_policy
from e3rl.rollout.calibrate import calibrate
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.train.summary import environment

ERASING = tuple((setting, t) for setting in (LATE_EPS, HALF_EPS) for t in TEMPERATURES)


@dataclass(frozen=True)
class Calibrated:
    """A way to erase and the statistics that stand in for siblings."""

    config: Config
    calibration: CalibrationStatistics


def calibrated(policy: Policy, family: str, setting: str, temperature: float, prompts: int) -> Calibrated:
    config = SETTINGS[setting].applied(configured(family, ("", temperature)))
    config = replace(config, rollout=replace(config.rollout, temperature=temperature))
    found = calibrate(policy, family, config, prompts=prompts, target=0.5, kappa0s=())
    return Calibrated(found.config, found.calibration)


def answered(policy: Policy, family: str, split: Split, problems: int, way: Calibrated, times: int) -> Counts:
    """Every problem ``times`` times, each answer alone."""
    config = replace(
        way.config, eval=replace(way.config.eval, num_samples=1, temperature=way.config.rollout.temperature)
    )
    runs = [
        evaluated(policy, family, split, problems, seeded, erase=True, calibration=way.calibration)
        for seeded in (replace(config, run=replace(config.run, seed=seed)) for seed in range(times))
    ]
    correct_PK = np.concatenate([run.correct_PK for run in runs], axis=1)
    tokens = sum(run.record()["tokens"] for run in runs)
    return Counts(correct_PK, {}, tokens / correct_PK.size)


def compared(policy: Policy, family: str, tuning: int, problems: int, times: int) -> dict[str, Any]:
    """Each kind in the way that is most accurate on the training half."""
    ways = {choice: calibrated(policy, family, *choice, tuning) for choice in ERASING}
    tried = {choice: answered(policy, family, "train", tuning, way, 2) for choice, way in ways.items()}
    erased = max(tried, key=lambda choice: float(tried[choice].avg_P.mean()))
    plain = {t: measured(policy, family, "train", tuning, ("", t)) for t in TEMPERATURES}
    best = max(plain, key=lambda t: float(plain[t].avg_P.mean()))
    drawn = min(round(tried[erased].tokens / plain[best].tokens), PLAIN)
    calm = max(plain, key=lambda t: float(plain[t].calmest(drawn, 1, LATE_EPS).avg_P.mean()))

    erasable = answered(policy, family, "heldout", problems, ways[erased], times)
    held_out = {t: measured(policy, family, "heldout", problems, ("", t)) for t in {best, calm}}
    n = min(round(erasable.tokens / held_out[best].tokens), PLAIN)
    c = held_out[calm]
    parts = [slice(i, i + n) for i in range(0, PLAIN - n + 1, n)]  # as many answers of n draws as there are draws for
    groups = [
        Counts(c.correct_PK[:, part], {x: u_PK[:, part] for x, u_PK in c.suspicion_PK.items()}, c.tokens)
        for part in parts
    ]
    reranked_P = np.mean([group.calmest(n, 1, LATE_EPS).avg_P for group in groups], axis=0)
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
    parser = arguments(__doc__)
    parser.set_defaults(problems=256)  # held out
    parser.add_argument(
        "--tuning", type=int, default=96, help="problems of the training half to calibrate and choose on"
    )
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
