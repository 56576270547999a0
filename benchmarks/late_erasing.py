"""Does erasing beat plain decoding at its best temperature, at equal tokens? The shipped model on graphs and chains.

    python benchmarks/late_erasing.py --json out.json          (ten minutes on one quiet core)

Erasable decoding as in the recipe 'recommended': the whole response is one segment, judged by its entropy alone. Temperatures
are chosen on problems of the training half and reported on the held-out half. Plain decoding gets as many samples more as the
erased tokens would have paid for; Pass counts them. 'rerank' spends them otherwise: it draws them all and keeps the 8 of least
entropy, which is the same evidence without a decision on the way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.evaluate.evaluation import evaluate, spread
from e3rl.evaluate.metrics import bootstrap_interval, pass_at_k
from e3rl.models import Policy, load_policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.engines import build_engine
from e3rl.train.environment import environment

FAMILIES = ("lab:path:2", "lab:path:3", "lab:ways:2", "lab:ways:3", "lab:chain:3")
TEMPERATURES = (1.0, 0.6, 0.3)
ERASABLE, PLAIN = 8, 24
"""Samples of a problem. Plain ones are more, so that Pass at the tokens of the erasable ones can be computed."""

Half = Literal["train", "eval"]


@dataclass(frozen=True)
class Counts:
    """Which samples of each problem are right, their mean entropies, and the tokens that one answer cost."""

    correct_PK: np.ndarray
    entropies_PK: np.ndarray
    tokens: float

    @property
    def samples(self) -> int:
        return int(self.correct_PK.shape[1])

    @property
    def avg_P(self) -> np.ndarray:
        return self.correct_PK.mean(axis=1)

    @property
    def right_P(self) -> np.ndarray:
        return self.correct_PK.sum(axis=1)

    def calmest(self, drawn: int, kept: int) -> Counts:
        """The ``kept`` of the first ``drawn`` samples with the least entropy."""
        order_PK = self.entropies_PK[:, :drawn].argsort(axis=1, kind="stable")[:, :kept]
        chosen = (np.take_along_axis(values, order_PK, axis=1) for values in (self.correct_PK, self.entropies_PK))
        return Counts(*chosen, tokens=self.tokens * drawn / kept)

    def pass_P(self, k: float) -> np.ndarray:
        """Pass at a fractional k, between its neighbours."""
        low = min(int(k), self.samples)
        high = min(low + 1, self.samples)
        below, above = (np.array([pass_at_k(int(c), self.samples, n) for c in self.right_P]) for n in (low, high))
        return below + (k - int(k)) * (above - below)


def configured(family: str, temperature: float, samples: int) -> Config:
    length = ["rollout.segment_length=64"] if family.startswith("lab:chain") else []
    config = load_config(find_recipe("recommended"), [], [f"data.train={family}", *length])
    sampling = replace(config.eval, num_samples=samples, temperature=temperature)
    return replace(config, eval=sampling)


def measured(policy: Policy, family: str, half: Half, problems: int, temperature: float, erase: bool) -> Counts:
    """One way to decode, on one half of a family."""
    config = configured(family, temperature, ERASABLE if erase else PLAIN)
    chosen = spread(load_problems(family, config=config.data, split=half), problems)
    limit = config.rollout.completion_limit
    prompts = render_prompts(
        chosen, policy.tokenizer, config.data, context_limit=policy.context_length, completion_limit=limit
    )
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    with Scorer(config.rewards, max_completion_length=limit) as scorer:
        done = evaluate(engine, prompts, scorer, policy.tokenizer, config, erase=erase)
    entropies_PK = np.array([[np.mean(t.entropies) for t in g.trajectories] for g in done.groups])
    return Counts(done.correct_PK, entropies_PK, done.record()["tokens"] / done.correct_PK.size)


def interval(values_P: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values_P)
    return {"mean": float(values_P.mean()), "low": low, "high": high}


def compare(policy: Policy, family: str, tuning: int, problems: int) -> dict[str, Any]:
    """The best plain against the best erasable decoding of a family, each temperature chosen on the training half."""
    tuned = {
        erase: {t: measured(policy, family, "train", tuning, t, erase) for t in TEMPERATURES} for erase in (False, True)
    }
    best = {erase: max(found, key=lambda t: float(found[t].avg_P.mean())) for erase, found in tuned.items()}
    plain = measured(policy, family, "eval", problems, best[False], erase=False)
    erasable = measured(policy, family, "eval", problems, best[True], erase=True)
    k = min(ERASABLE * erasable.tokens / plain.tokens, PLAIN)
    drawn = round(k)
    calm = max(TEMPERATURES, key=lambda t: float(tuned[False][t].calmest(drawn, ERASABLE).avg_P.mean()))
    rerank = measured(policy, family, "eval", problems, calm, erase=False).calmest(drawn, ERASABLE)
    return {
        "temperatures": {"plain": best[False], "erasable": best[True], "rerank": calm},
        "tokens": {"plain": plain.tokens, "erasable": erasable.tokens},
        "avg": {name: interval(c.avg_P) for name, c in (("plain", plain), ("erasable", erasable), ("rerank", rerank))},
        "pass": {"plain": interval(plain.pass_P(k)), "erasable": interval(erasable.pass_P(ERASABLE)), "plain_k": k}
        | {"rerank": interval(rerank.pass_P(ERASABLE))},
        "difference": {
            "avg": interval(erasable.avg_P - plain.avg_P),
            "pass": interval(erasable.pass_P(ERASABLE) - plain.pass_P(k)),
            "avg_rerank": interval(erasable.avg_P - rerank.avg_P),
            "pass_rerank": interval(erasable.pass_P(ERASABLE) - rerank.pass_P(ERASABLE)),
        },
    }


def shown(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| problems | T plain / erasable | tokens × | Avg, plain | Avg, erasable | Avg, difference | relative | Pass, plain | "
        f"Pass@{ERASABLE}, erasable | Pass, difference | rerank: T, Avg / Pass@{ERASABLE} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family, row in rows.items():
        t, avg, passed, gap = row["temperatures"], row["avg"], row["pass"], row["difference"]
        relative = avg["erasable"]["mean"] / avg["plain"]["mean"] - 1
        cells = [
            f"`{family}`",
            f"{t['plain']:g} / {t['erasable']:g}",
            f"{row['tokens']['erasable'] / row['tokens']['plain']:.2f}",
            shown(avg["plain"]),
            shown(avg["erasable"]),
            shown(gap["avg"], "+"),
            f"{100 * relative:+.0f} %",
            f"{shown(passed['plain'])} at k = {passed['plain_k']:.1f}",
            shown(passed["erasable"]),
            shown(gap["pass"], "+"),
            f"{t['rerank']:g}, {avg['rerank']['mean']:.3f} / {passed['rerank']['mean']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument(
        "--tuning", type=int, default=64, help="problems of the training half to choose temperatures on"
    )
    parser.add_argument("--problems", type=int, default=192, help="held-out problems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(replace(load_config(find_recipe("recommended")).model, path=options.model))
    rows: dict[str, Any] = {}
    for family in options.families:
        rows[family] = compare(policy, family, options.tuning, options.problems)
        result = {"environment": environment(), "model": options.model, "problems": options.problems, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(markdown({family: rows[family]}), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
