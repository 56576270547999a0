"""Which late judgement, which threshold? Variants of erasing whole responses, replayed over one pool of plain samples.

    python benchmarks/late_variants.py --json out.json          (two minutes on one quiet core)
    python benchmarks/late_variants.py --json out.json --model smollm2 --families lab:arith:1 --problems 48 --samples 16 \
        --temperatures 0.6 0.3          (fifteen minutes on one quiet core)

A whole response that is erased is drawn again from its prompt, so erasing can be replayed exactly over independent samples of
each prompt, drawn once. The first temperature is the one that everything is erased at. All problems are of the training half:
this is where settings are chosen, not where they are reported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_erasing import configured, opened

from e3rl.diagnose.statistics import within_prefix_auroc
from e3rl.evaluate.metrics import pass_at_k
from e3rl.lab.problems import grade
from e3rl.models import Policy, load_policy
from e3rl.rewards.answers import extract_answer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.summary import environment
from e3rl.types import Trajectory

GROUP, REPEATS = 8, 4
ETA, DELTA = 0.05, 1.5
"""The attempt penalty's defaults (eq 17)."""

Baseline = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Pool:
    """Independent samples of each problem, [P, K] each. ``later``: mean entropy of a response's later half; ``answer``: the
    number of the first sample of the problem that answers alike."""

    entropy: np.ndarray
    peak: np.ndarray
    median: np.ndarray
    later: np.ndarray
    eps: np.ndarray
    largest_eps: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    answer: np.ndarray

    @property
    def samples(self) -> int:
        return int(self.right.shape[1])

    def late(self, weight: float = 0.3, alpha: float = 1.0) -> np.ndarray:
        """Entropy and ε summed over n tokens and divided by n to the ``alpha``: 1 for the mean."""
        return (self.entropy + weight * self.eps) * self.tokens ** (1 - alpha)

    def pass_at(self, k: int) -> float:
        return float(np.mean([pass_at_k(int(right), self.samples, k) for right in self.right.sum(axis=1)]))


@dataclass(frozen=True)
class Outcome:
    """Avg and Pass of a group, and tokens of an answer over those of a plain one."""

    avg: float
    passed: float
    cost: float

    def __str__(self) -> str:
        return f"{self.avg:.3f} / {self.passed:.3f}, × {self.cost:.2f}"


def _numbers(trajectory: Trajectory, right: bool) -> tuple[float, ...]:
    eps = [x for s in trajectory.segments for x in s.candidate.perturbations.tolist()]
    entropies = np.array(trajectory.entropies)
    summaries = (entropies.mean(), entropies.max(), np.median(entropies), entropies[len(entropies) // 2 :].mean())
    return (*summaries, np.mean(eps), max(eps), right, len(entropies))


def draw(policy: Policy, family: str, problems: int, samples: int, temperature: float, measured_at: float) -> Pool:
    """The pool of a family's training half at a temperature, its entropies and ε measured at another (0: the same)."""
    config = configured(family, ("", temperature))
    rollout = replace(config.rollout, erase=False, num_generations=samples, temperature=temperature)
    config = replace(config, rollout=rollout, erasure=replace(config.erasure, entropy_temperature=measured_at))
    prompts, engine = opened(policy, family, "train", problems, config)
    settings = GroupSettings(config.rollout, config.erasure, config.run.seed)
    found = {}
    for group in run_groups(engine, prompts, settings):
        texts = [policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in group.trajectories]
        rights = [grade(group.prompt.problem, text) for text in texts]
        answers = [extract_answer(text) or text.strip() for text in texts]
        found[group.prompt.problem.id] = [
            (*_numbers(t, r), answers.index(a)) for t, r, a in zip(group.trajectories, rights, answers, strict=True)
        ]
    table = np.array([found[p.problem.id] for p in prompts]).transpose(2, 0, 1)
    columns = [*table[:6], table[6].astype(bool), *table[7:]]
    return Pool(*columns)


def replay(
    pool: Pool,
    u_PK: np.ndarray,
    baseline: Baseline,
    *,
    erasures: int = 5,
    last: bool = False,
    retries: tuple[Pool, np.ndarray] | None = None,
    one_of_each: bool = False,
) -> Outcome:
    """Erase whole responses whose U is above the threshold that ``baseline`` takes from the first `GROUP` samples. ``last``:
    a spent budget commits the last attempt, not the calmest. ``retries``: another pool that redrawn responses come from.
    ``one_of_each``: no answer is lost: the first sample with an answer stays, and so does a retry with a new one."""
    other, other_u = retries or (pool, u_PK)
    rng = np.random.default_rng(0)
    avg, passed, tokens = [], [], 0.0
    for p in np.tile(np.arange(len(u_PK)), REPEATS):
        order, spare = rng.permutation(pool.samples), rng.permutation(pool.samples)
        firsts, again = order[:GROUP], iter((order[GROUP:] if retries is None else spare).tolist() * GROUP)
        level, good = baseline(u_PK[p, firsts]), 0
        seen: set[float] = set()
        for first in firsts:
            tries = [(u_PK[p, first], bool(pool.right[p, first]))]
            tokens += pool.tokens[p, first]
            new = one_of_each and pool.answer[p, first] not in seen
            seen.add(pool.answer[p, first])
            while not new and tries[-1][0] > level * np.exp(ETA * (len(tries) - 1) ** DELTA) and len(tries) <= erasures:
                i = next(again)
                tries.append((other_u[p, i], bool(other.right[p, i])))
                tokens += other.tokens[p, i]
                new = one_of_each and other.answer[p, i] not in pool.answer[p, firsts]
            spent = tries[-1][0] > level * np.exp(ETA * (len(tries) - 1) ** DELTA)
            good += min(tries)[1] if spent and not last and not new else tries[-1][1]
        avg.append(good / GROUP)
        passed.append(good > 0)
    return Outcome(float(np.mean(avg)), float(np.mean(passed)), tokens / (len(avg) * GROUP) / float(pool.tokens.mean()))


def rerank(pool: Pool, u_PK: np.ndarray, drawn: int) -> Outcome:
    """Draw so many and keep the `GROUP` calmest."""
    rng = np.random.default_rng(0)
    rows = np.tile(np.arange(len(u_PK)), REPEATS)
    kept = [
        (p, (seen := rng.permutation(pool.samples)[:drawn])[u_PK[p, seen].argsort(kind="stable")[:GROUP]]) for p in rows
    ]
    right = np.array([pool.right[p, index] for p, index in kept])
    return Outcome(float(right.mean()), float(right.any(axis=1).mean()), drawn / GROUP)


def quantile(share: float) -> Baseline:
    return lambda u: float(np.quantile(u, share))


def kappa(kappa0: float) -> Baseline:
    return lambda u: float(u.mean() + kappa0 * u.std())


def where_unlikely(pool: Pool) -> np.ndarray:
    """Forks told from errors: suspicious only where some draw was unlikely for its problem (ε above the group's median)."""
    unlikely = pool.largest_eps > np.median(pool.largest_eps, axis=1, keepdims=True)
    return np.where(unlikely, pool.late(), pool.late().min())


def variants(pools: Mapping[float, Pool]) -> dict[str, Outcome]:
    """Every variant at the first temperature, and retries at the others."""
    (_, hot), *cooler = pools.items()
    u = hot.late()
    found = {f"plain, T = {t:g}": Outcome(float(p.right.mean()), p.pass_at(GROUP), 1.0) for t, p in pools.items()}
    found |= {f"κ₀ = {k:g}": replay(hot, u, kappa(k)) for k in (0.0, -0.5, -1.0, -1.5)}
    found |= {f"quantile {q:g}": replay(hot, u, quantile(q)) for q in (0.5, 0.3, 0.2, 0.1)}
    found["quantile 0.2, last attempt committed"] = replay(hot, u, quantile(0.2), last=True)
    found |= {f"quantile 0.2, E_max = {e}": replay(hot, u, quantile(0.2), erasures=e) for e in (1, 3, 8)}
    found["one threshold for all problems: mean of U"] = replay(hot, u, lambda _: float(u.mean()))
    found["one threshold for all problems: mean − ½ std"] = replay(hot, u, lambda _: float(u.mean() - u.std() / 2))
    for t, pool in cooler:
        found[f"quantile 0.2, retries at T = {t:g}"] = replay(hot, u, quantile(0.2), retries=(pool, pool.late()))
        found[f"quantile 0.2, all at T = {t:g}"] = replay(pool, pool.late(), quantile(0.2))
    for q in (0.5, 0.2):
        found[f"quantile {q:g}, one of each answer stays"] = replay(hot, u, quantile(q), one_of_each=True)
    found["only where ε was high"] = replay(hot, where_unlikely(hot), quantile(0.2))
    found |= {f"rerank, calmest 8 of {n}": rerank(hot, u, n) for n in (16, 20, 24) if n <= hot.samples}
    return found


def spread(pools: Mapping[float, Pool]) -> dict[str, dict[str, float]]:
    """How much there is to win: what many draws find, and the share of problems that are right or wrong in each of them."""
    found = {}
    for t, pool in pools.items():
        solved = pool.right.mean(axis=1)
        numbers = {f"Pass@{k}": pool.pass_at(k) for k in (GROUP, 16, pool.samples)}
        numbers["all right or all wrong"] = float(((solved == 0) | (solved == 1)).mean())
        found[f"T = {t:g}, {pool.samples} draws"] = {"Avg": float(solved.mean()), **numbers}
    return found


def judgements(pool: Pool) -> dict[str, tuple[float, Outcome]]:
    """AUROC among answers to one problem and the outcome at the fifth, by the weight of ε and by how tokens are summed up."""
    candidates = {f"entropy + {w:g} ε": pool.late(w) for w in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)}
    candidates |= {"ε alone": pool.eps, "largest entropy": pool.peak}
    candidates |= {"median entropy": pool.median, "entropy of the later half": pool.later}
    candidates |= {f"entropy + 0.3 ε, sum / n^{alpha:g}": pool.late(alpha=alpha) for alpha in (0.5, 0.0)}
    candidates |= {"entropy, sum": pool.late(0.0, alpha=0.0), "length": pool.tokens}
    problem = np.repeat(np.arange(len(pool.right)), pool.samples).astype(str)
    found = {}
    for name, u in candidates.items():
        auroc = within_prefix_auroc(u.ravel(), ~pool.right.ravel(), problem, problem).value
        found[name] = (auroc or float("nan"), replay(pool, u, quantile(0.2)))
    return found


def told_of(found: Mapping[str, tuple[float, Outcome]]) -> dict[str, tuple[str, str]]:
    return {name: (f"{auroc:.2f}", str(outcome)) for name, (auroc, outcome) in found.items()}


def show(family: str, found: Mapping[str, Any]) -> None:
    for name, numbers in found["spread"].items():
        print(f"\n{family}, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    for temperature, rows in found["judgements"].items():
        print(
            f"\n| {family}, {temperature}, quantile 0.2 | AUROC within a problem | Avg@{GROUP} / Pass@{GROUP}, tokens |"
        )
        print("| --- | --- | --- |")
        for name, (auroc, outcome) in rows.items():
            print(f"| {name} | {auroc} | {outcome} |")
    print(f"\n| {family}, variant | Avg@{GROUP} / Pass@{GROUP}, tokens |\n| --- | --- |")
    for name, outcome in found["variants"].items():
        print(f"| {name} | {outcome} |", flush=True)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What the benchmarks of one model have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--families", nargs="+", default=["lab:path:2", "lab:ways:2"])
    parser.add_argument("--problems", type=int, default=128)
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=48, help="draws of each problem")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.6, 0.3])
    parser.add_argument(
        "--measured-at",
        type=float,
        default=1.0,
        help="erasure.entropy_temperature, at which entropy and ε are measured; 0: as drawn",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = load_policy(replace(configured(options.families[0], ("", 1.0)).model, path=options.model))
    names = ("model", "problems", "samples", "measured_at")
    told = {name: getattr(options, name) for name in names}
    result: dict[str, Any] = {"environment": environment(), **told}
    for family in options.families:
        sizes = (options.problems, options.samples)
        pools = {t: draw(policy, family, *sizes, t, options.measured_at) for t in options.temperatures}
        result[family] = {
            "spread": spread(pools),
            "judgements": {f"T = {t:g}": told_of(judgements(pool)) for t, pool in pools.items()},
            "variants": {name: str(outcome) for name, outcome in variants(pools).items()},
        }
        show(family, result[family])
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
