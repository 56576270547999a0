"""Does erasing beat plain decoding at its best temperature, at equal tokens? On graphs and chains, or on SmolLM2's arithmetic.

    python benchmarks/late_erasing.py --json out.json          (ten minutes on one quiet core)
    python benchmarks/late_erasing.py --json out.json --models RUN0/model RUN1/model --families lab:path:2
    python benchmarks/late_erasing.py --json out.json --models smollm2 --families lab:arith:1-3 --settings whole whole+eps

Erasable decoding judges whole responses, or halves. Temperature and setting are chosen on problems of the training half
and reported on the held-out half. Plain decoding gets as many samples more as the erased tokens would have paid for; Pass
counts them. A low temperature is right more often and solves fewer problems, so plain decoding at temperature 1 stands
beside it ('hot'). 'rerank' spends them otherwise: it draws them all and keeps the 8 of least U (entropy + 0.3 ε, weighed by
length where one of the settings does), which is the same evidence without a decision on the way. Several models are seeds of
one training: what is shown is each problem's mean over them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.decoding import HALF_EPS, LATE_EPS, SETTINGS
from e3rl.diagnose.signals import LENGTH_EXPONENT, late_suspicion
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.evaluate.evaluation import Evaluation, evaluate
from e3rl.evaluate.metrics import bootstrap_interval, pass_at_k
from e3rl.lab.problems import Split, load
from e3rl.models import Policy, load_policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.train.summary import environment
from e3rl.types import Prompt

FAMILIES = ("lab:path:2", "lab:path:3", "lab:ways:2", "lab:ways:3", "lab:chain:3")
TEMPERATURES = (1.0, 0.6, 0.3)
LIMITS = {"arith": 32, "chain": 64}
"""Most tokens of a response; of the others 8."""

ERASABLE, PLAIN = 8, 18
"""Samples of a problem. Plain ones are more, so that Pass at the tokens of the erasable ones can be computed."""

Choice = tuple[str, float]
"""A setting of `e3rl.diagnose.decoding.SETTINGS` (empty: plain) and a temperature."""


@dataclass(frozen=True)
class Counts:
    """Which samples of each problem are right, how suspicious they are by each exponent of their length, and the tokens that
    one answer cost."""

    correct_PK: np.ndarray
    suspicion_PK: Mapping[float, np.ndarray]
    tokens: float

    @property
    def avg_P(self) -> np.ndarray:
        return self.correct_PK.mean(axis=1)

    def calmest(self, drawn: int, kept: int, setting: str) -> Counts:
        """The ``kept`` of the first ``drawn`` samples that are least suspicious by the length exponent of a setting."""
        evidence_PK = self.suspicion_PK[SETTINGS[setting].length_exponent]
        order_PK = evidence_PK[:, :drawn].argsort(axis=1, kind="stable")[:, :kept]
        return Counts(np.take_along_axis(self.correct_PK, order_PK, axis=1), {}, self.tokens * drawn / kept)

    def pass_P(self, k: float) -> np.ndarray:
        """Pass at a fractional k, between its neighbours."""
        samples = int(self.correct_PK.shape[1])
        low = min(int(k), samples)
        high = min(low + 1, samples)
        right_P = self.correct_PK.sum(axis=1)
        below, above = (np.array([pass_at_k(int(c), samples, n) for c in right_P]) for n in (low, high))
        return below + (k - int(k)) * (above - below)


def configured(family: str, choice: Choice) -> Config:
    name = family.split(":")[1]
    limit = [f"rollout.segment_length={LIMITS[name]}", "rollout.max_segments=1"] if name in LIMITS else []
    config = load_config(find_recipe("recommended"), [], [f"data.train={family}", "rollout.max_rows=64", *limit])
    setting, temperature = choice
    sampling = replace(config.eval, num_samples=ERASABLE if setting else PLAIN, temperature=temperature)
    return replace(SETTINGS[setting].applied(config) if setting else config, eval=sampling)


def opened(policy: Policy, family: str, split: Split, problems: int, config: Config) -> tuple[list[Prompt], Engine]:
    """A family's prompts and an engine with room for them."""
    sizes = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    prompts = render_prompts(load(family, split, problems), policy.tokenizer, config.data, **sizes)
    return prompts, build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))


def evaluated(
    policy: Policy,
    family: str,
    split: Split,
    problems: int,
    config: Config,
    *,
    erase: bool,
    calibration: CalibrationStatistics | None = None,
) -> Evaluation:
    """A family sampled and graded under ``config.eval``."""
    prompts, engine = opened(policy, family, split, problems, config)
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        way: dict[str, Any] = {"erase": erase, "calibration": calibration, "keep_trajectories": True}
        return evaluate(engine, prompts, scorer, policy.tokenizer, config, **way)


def measured(policy: Policy, family: str, split: Split, problems: int, choice: Choice) -> Counts:
    """One way to decode, on one half of a family."""
    done = evaluated(policy, family, split, problems, configured(family, choice), erase=bool(choice[0]))
    suspicion_PK = {
        x: np.array([[late_suspicion(t, x) for t in row] for row in done.trajectories_PK])
        for x in (0.0, LENGTH_EXPONENT)
    }
    return Counts(done.correct_PK, suspicion_PK, done.record()["tokens"] / done.correct_PK.size)


def interval(values_P: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values_P)
    return {"mean": float(values_P.mean()), "low": low, "high": high}


def tuned(policy: Policy, family: str, settings: Sequence[str], problems: int) -> dict[str, Choice]:
    """The most accurate choice of each kind on the training half; of those that erase or rerank, where there are any, one
    that solves as many problems as plain decoding does with the same tokens. Reranking spends the tokens of erasing."""

    def all_of(names: Sequence[str]) -> dict[Choice, Counts]:
        choices = [(name, t) for name in names for t in TEMPERATURES]
        return {c: measured(policy, family, "train", problems, c) for c in choices}

    def best(found: Mapping[Choice, Counts]) -> Choice:
        return max(found, key=lambda choice: float(found[choice].avg_P.mean()))

    plain = all_of([""])
    reference = plain[best(plain)]

    def keeps_pass(counts: Counts) -> bool:
        k = min(ERASABLE * counts.tokens / reference.tokens, PLAIN)
        return float((counts.pass_P(ERASABLE) - reference.pass_P(k)).mean()) >= 0

    def chosen(found: Mapping[Choice, Counts]) -> Choice:
        return best({c: counts for c, counts in found.items() if keeps_pass(counts)} or found)

    erasable = all_of(settings)
    erased = chosen(erasable)
    k = min(ERASABLE * erasable[erased].tokens / reference.tokens, PLAIN)
    by_evidence = {SETTINGS[name].length_exponent: name for name in reversed(settings)}
    calm = chosen(
        {(name, t): c.calmest(round(k), ERASABLE, name) for name in by_evidence.values() for (_, t), c in plain.items()}
    )
    return {"plain": best(plain), "erasable": erased, "rerank": calm}


def compare(
    policies: Sequence[Policy], family: str, settings: Sequence[str], tuning: int, problems: int
) -> dict[str, Any]:
    """The best plain against the best erasable decoding of a family, chosen with the first model on the training half."""
    choices = tuned(policies[0], family, settings, tuning) | {"hot": ("", 1.0)}
    avg: dict[str, list[np.ndarray]] = {kind: [] for kind in choices}
    passed: dict[str, list[np.ndarray]] = {kind: [] for kind in choices}
    tokens: dict[str, list[float]] = {"plain": [], "erasable": []}
    for policy in policies:
        evidence, rerank_T = choices["rerank"]
        ways = {choices["plain"], choices["hot"], choices["erasable"], ("", rerank_T)}
        found = {way: measured(policy, family, "heldout", problems, way) for way in ways}
        plain, erasable = found[choices["plain"]], found[choices["erasable"]]
        k = min(ERASABLE * erasable.tokens / plain.tokens, PLAIN)
        rerank = found[("", rerank_T)].calmest(round(k), ERASABLE, evidence)
        hot = found[choices["hot"]]
        hot_k = min(ERASABLE * erasable.tokens / hot.tokens, PLAIN)
        shown_at = {
            "plain": (plain, k),
            "erasable": (erasable, ERASABLE),
            "rerank": (rerank, ERASABLE),
            "hot": (hot, hot_k),
        }
        for kind, (counts, at) in shown_at.items():
            avg[kind].append(counts.avg_P)
            passed[kind].append(counts.pass_P(at))
        tokens["plain"].append(plain.tokens)
        tokens["erasable"].append(erasable.tokens)
    avg_P, pass_P = ({kind: np.mean(rows, axis=0) for kind, rows in table.items()} for table in (avg, passed))
    cost = {kind: float(np.mean(values)) for kind, values in tokens.items()}
    return {
        "choices": choices,
        "tokens": cost,
        "plain_k": min(ERASABLE * cost["erasable"] / cost["plain"], PLAIN),
        "avg": {kind: interval(values) for kind, values in avg_P.items()},
        "pass": {kind: interval(values) for kind, values in pass_P.items()},
        "by_model": {kind: [float(row.mean()) for row in rows] for kind, rows in avg.items()},
        "difference": {
            f"{name}_{other}": interval(values["erasable"] - values[other])
            for name, values in (("avg", avg_P), ("pass", pass_P))
            for other in ("plain", "rerank", "hot")
        },
    }


def shown(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} ({value['low']:{sign}.3f} to {value['high']:{sign}.3f})"


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        f"| problems | plain T; erasable; rerank by | tokens × | Avg: plain, erasable, rerank | erasable − plain | relative | "
        f"Pass at equal tokens, Pass@{ERASABLE} erasable, rerank | erasable − plain | Avg, Pass: erasable − rerank | "
        "plain at T = 1: Avg, Pass at equal tokens; Pass, erasable − it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family, row in rows.items():
        choices, avg, passed, gap = row["choices"], row["avg"], row["pass"], row["difference"]
        setting, temperature = choices["erasable"]
        cells = [
            f"`{family}`",
            f"{choices['plain'][1]:g}; {setting} at {temperature:g}; {' at '.join(map(str, choices['rerank']))}",
            f"{row['tokens']['erasable'] / row['tokens']['plain']:.2f}",
            ", ".join(shown(avg[kind]) for kind in ("plain", "erasable", "rerank")),
            shown(gap["avg_plain"], "+"),
            f"{100 * (avg['erasable']['mean'] / max(avg['plain']['mean'], 1e-9) - 1):+.0f} %",
            ", ".join(shown(passed[kind]) for kind in ("plain", "erasable", "rerank")) + f"; k = {row['plain_k']:.1f}",
            shown(gap["pass_plain"], "+"),
            f"{shown(gap['avg_rerank'], '+')}, {shown(gap['pass_rerank'], '+')}",
            f"{shown(avg['hot'])}, {shown(passed['hot'])}; {shown(gap['pass_hot'], '+')}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["lab"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument(
        "--settings", nargs="+", default=[LATE_EPS, HALF_EPS], help="late settings of `e3rl diagnose` to choose from"
    )
    parser.add_argument("--tuning", type=int, default=64, help="problems of the training half to choose on")
    parser.add_argument("--problems", type=int, default=192, help="held-out problems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_config(find_recipe("recommended")).model
    policies = [load_policy(replace(model, path=path)) for path in options.models]
    rows: dict[str, Any] = {}
    for family in options.families:
        rows[family] = compare(policies, family, options.settings, options.tuning, options.problems)
        told = {"models": options.models, "tuning": options.tuning, "problems": options.problems}
        result = {"environment": environment(), **told, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(markdown({family: rows[family]}), flush=True)


if __name__ == "__main__":
    main()
