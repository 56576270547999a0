"""Which number of a finished response tells wrong answers from right ones? A model on GSM8K, 150 problems × 8 samples.

``python benchmarks/gsm8k_signals.py sample MODEL FILE OUT`` draws the samples (FILE: JSON lines with ``problem`` and ``answer``;
goes on where it stopped) and ``… report OUT`` prints the table: AUROC within a problem, the same within strata of equal
log-probability (what log-probability knows, a lower temperature buys as well), and Avg and Pass at k. Then what the same samples
give at the tokens of N answers: the calmest, the commonest answer, and whole responses erased until one is calm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from e3rl import generate, load_config
from e3rl.models import load_policy
from e3rl.types import Message, Trajectory

PROBLEMS, SAMPLES, BATCH, TEMPERATURE = 150, 8, 4, 0.7
WINDOW = 32  # tokens of the worst window and of the tail
STRATA = 4
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
SETTINGS = [
    "rollout.segment_length=64", "rollout.max_segments=5", f"rollout.temperature={TEMPERATURE}", "rollout.top_p=1",
    "rollout.top_k=0", "rollout.max_rows=32", "rollout.cache_rows=32",
]  # fmt: skip


def right(text: str, answer: str) -> bool:
    """Whether the last boxed number is the answer. GSM8K's answers are integers."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    found = re.sub(r"[^\d./-]", "", boxes[-1]) if boxes else ""
    try:
        return Fraction(found) == Fraction(answer)
    except (ValueError, ZeroDivisionError):
        return False


def _window(values: np.ndarray, width: int = WINDOW) -> float:
    """Largest mean over any window."""
    if len(values) <= width:
        return float(values.mean())
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return float((sums[width:] - sums[:-width]).max() / width)


def features(trajectory: Trajectory) -> dict[str, float]:
    """What can be said of a response without its answer; the larger, the more suspicious."""
    h, logp = np.asarray(trajectory.entropies, float), np.asarray(trajectory.logprobs, float)
    eps = np.concatenate([np.asarray(s.candidate.perturbations, float) for s in trajectory.segments])
    ids = np.concatenate([np.asarray(s.candidate.ids) for s in trajectory.segments])
    pairs = list(zip(ids[:-3].tolist(), ids[1:-2].tolist(), ids[2:-1].tolist(), ids[3:].tolist(), strict=True))
    return {
        "entropy": float(h.mean()),
        "ε": float(eps.mean()),
        "entropy + 0.3 ε": float(h.mean() + 0.3 * eps.mean()),
        "cross-entropy": float(-logp.mean()),
        "−log p, sum": float(-logp.sum()),
        "largest entropy": float(h.max()),
        "largest ε": float(eps.max()),
        "worst window, entropy": _window(h),
        "worst window, −log p": _window(-logp),
        "tail entropy": float(h[-WINDOW:].mean()),
        "entropy, second half": float(h[len(h) // 2 :].mean()),
        "ε, second half": float(eps[len(eps) // 2 :].mean()),
        "length": float(len(h)),
        "repeats": 1.0 - len(set(pairs)) / max(1, len(pairs)),
    }


def sample(model: str, data: Path, out: Path) -> None:
    """Draw what is missing, a batch of problems at a time."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [rows[i * len(rows) // PROBLEMS] for i in range(PROBLEMS)]
    done = len(_read(out)) // SAMPLES if out.exists() else 0
    policy, config = load_policy(replace(load_config().model, path=model)), load_config(overrides=SETTINGS)
    for start in range(done, PROBLEMS, BATCH):
        part = rows[start : start + BATCH]
        config = load_config(overrides=[*SETTINGS, f"run.seed={start}"])
        prompts = [[Message("user", f"{row['problem']}\n{INSTRUCTION}")] for row in part]
        found = generate(policy, prompts, samples=SAMPLES, erase=False, config=config)
        with out.open("a", encoding="utf-8") as file:
            for i, (row, group) in enumerate(zip(part, found, strict=True)):
                for one in group:
                    record = {
                        "problem": start + i,
                        "right": right(one.text, row["answer"]),
                        "finish": one.trajectory.finish,
                        "answer": (re.findall(r"\\boxed\{([^{}]*)\}", one.text) or [None])[-1],
                        **features(one.trajectory),
                    }
                    file.write(json.dumps(record) + "\n")
        print(f"{start + len(part)} of {PROBLEMS} problems", flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pairs(
    rows: Sequence[dict[str, Any]], name: str, same: Callable[[dict[str, Any], dict[str, Any]], bool]
) -> tuple[float, int]:
    """Wrong-right pairs that the number puts in order (ties half), and all pairs that may be compared."""
    wins, count = 0.0, 0
    for bad in (r for r in rows if not r["right"]):
        for good in (r for r in rows if r["right"]):
            if same(bad, good):
                count += 1
                wins += (bad[name] > good[name]) + 0.5 * (bad[name] == good[name])
    return wins, count


def _auroc(groups: Sequence[Sequence[dict[str, Any]]], name: str, same: Callable[..., bool]) -> Iterator[float]:
    """AUROC within a problem, its 95 % bootstrap interval over problems, and the pairs behind it."""
    won = np.array([_pairs(group, name, same) for group in groups])
    yield won[:, 0].sum() / max(1, won[:, 1].sum())
    draws = np.random.default_rng(0).integers(0, len(won), (1000, len(won)))
    totals = won[draws].sum(axis=1)
    yield from np.nanquantile(totals[:, 0] / np.maximum(1, totals[:, 1]), [0.025, 0.975])
    yield float(won[:, 1].sum())


def _agreed(group: Sequence[dict[str, Any]]) -> None:
    """Adds the share of siblings with another answer, or none."""
    for r in group:
        same = sum(r["answer"] is not None and r["answer"] == other["answer"] for other in group) - (
            r["answer"] is not None
        )
        r["disagreement"] = 1 - same / (len(group) - 1)


def _headed(groups: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]) -> None:
    """Adds a learnt head: logistic in the differences between wrong and right siblings, from the other half of the problems."""
    values = np.array([[r[name] for name in names] for group in groups for r in group])
    centre, spread = values.mean(0), values.std(0)
    for half in (0, 1):
        taught = [group for i, group in enumerate(groups) if i % 2 != half]
        found = [
            [bad[name] - good[name] for name in names]
            for group in taught
            for bad, good in itertools.product(group, group)
            if good["right"] and not bad["right"]
        ]
        differences, weights = np.array(found) / spread, np.zeros(len(names))
        for _ in range(500):  # gradient descent on the mean loss + |w|² / 20
            missed = 1 / (1 + np.exp(differences @ weights))
            weights -= 0.1 * (0.1 * weights - (missed[:, None] * differences).mean(0))
        for group in groups[half::2]:
            for r in group:
                r["learnt head"] = float((np.array([r[name] for name in names]) - centre) / spread @ weights)


def _calmest(group: Sequence[dict[str, Any]], n: int, name: str) -> float:
    """Chance that of n samples the calmest is right, over all choices of n."""
    order = sorted(group, key=lambda r: r[name])
    chances = [math.comb(len(order) - 1 - i, n - 1) / math.comb(len(order), n) for i in range(len(order))]
    return sum(chance * r["right"] for chance, r in zip(chances, order, strict=True))


def _commonest(group: Sequence[dict[str, Any]], n: int) -> float:
    """Chance that of n samples the commonest answer is right (ties: their mean), over all choices of n."""
    shares = list[float]()
    for chosen in itertools.combinations(group, n):
        counts: dict[str, list[bool]] = {}
        for r in chosen:
            if r["answer"] is not None:
                counts.setdefault(r["answer"], []).append(r["right"])
        most = max(map(len, counts.values()), default=0)
        shares.append(float(np.mean([c[0] for c in counts.values() if len(c) == most])) if counts else 0.0)
    return float(np.mean(shares))


def _erased(group: Sequence[dict[str, Any]], calm: float, retries: int, name: str) -> tuple[float, float]:
    """Chance of a right answer, and tokens, where a whole response that is not calm is drawn again; the last one stays.

    The samples stand for draws, in 200 random orders.
    """
    generator, right, tokens = np.random.default_rng(0), 0.0, 0.0
    for _ in range(200):
        for attempt, index in enumerate(generator.permutation(len(group))[: retries + 1]):
            tokens += group[index]["length"]
            if group[index][name] <= calm or attempt == retries:
                right += group[index]["right"]
                break
    return right / 200, tokens / 200


def decoded(groups: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Right answers, one for each problem, at the tokens of N answers; intervals over problems."""
    name, plain = "entropy + 0.3 ε", np.array([np.mean([r["right"] for r in group]) for group in groups])
    tokens = np.array([np.mean([r["length"] for r in group]) for group in groups])
    ways: dict[str, tuple[np.ndarray, float]] = {"plain": (plain, 1.0)}
    for n in (2, 3, 4, 8):
        ways[f"calmest of {n}"] = (np.array([_calmest(g, n, name) for g in groups]), n)
        ways[f"commonest of {n}"] = (np.array([_commonest(g, n) for g in groups]), n)
    for share, retries in ((0.5, 1), (0.5, 7), (0.2, 7)):
        found = []
        for i, group in enumerate(groups):  # the threshold comes from the other half of the problems
            others = [r[name] for g in groups[1 - i % 2 :: 2] for r in g]
            found.append(_erased(group, float(np.quantile(others, share)), retries, name))
        right, spent = np.array(found).T
        ways[f"erased, quantile {share:g}, at most {retries} times"] = (right, float(spent.sum() / tokens.sum()))
    print("\n| one answer | tokens × | right | − plain |\n| --- | --- | --- | --- |")
    draws = np.random.default_rng(0).integers(0, len(groups), (1000, len(groups)))
    for way, (right, cost) in ways.items():
        cells = []
        for sign, values in (("", right), ("+", right - plain)):
            low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
            cells.append(f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})")
        print(f"| {way} | {cost:.2f} | {' | '.join(cells)} |")


def report(out: Path) -> None:
    """The tables, for all samples and for those that ended by themselves."""
    rows = _read(out)
    groups = [[r for r in rows if r["problem"] == p] for p in sorted({r["problem"] for r in rows})]
    _headed(groups, [n for n in rows[0] if n not in ("problem", "right", "finish", "answer")])
    for group in groups:
        _agreed(group)
    edges = np.quantile([r["−log p, sum"] for r in rows], np.linspace(0, 1, STRATA + 1)[1:-1])
    for r in rows:
        r["stratum"] = int(np.searchsorted(edges, r["−log p, sum"]))
    finished = [[r for r in g if r["finish"] == "stop"] for g in groups]
    avg = np.mean([r["right"] for r in rows])
    passed = np.mean([any(r["right"] for r in g) for g in groups])
    print(f"{len(groups)} problems × {SAMPLES}, T = {TEMPERATURE}: Avg {avg:.3f}, Pass@{SAMPLES} {passed:.3f}, "
          f"finished {np.mean([r['finish'] == 'stop' for r in rows]):.3f}\n")  # fmt: skip
    print("| signal | all | finished | within strata of log p |\n| --- | --- | --- | --- |")
    names = [n for n in rows[0] if n not in ("problem", "right", "finish", "answer", "stratum")]
    for name in names:
        cells = []
        for chosen, same in (
            (groups, lambda a, b: True),
            (finished, lambda a, b: True),
            (groups, lambda a, b: a["stratum"] == b["stratum"]),
        ):
            value, low, high, count = _auroc(chosen, name, same)
            cells.append(f"{value:.3f} ({low:.3f}–{high:.3f}; {count:.0f} pairs)")
        print(f"| {name} | {' | '.join(cells)} |")
    decoded(groups)


def main() -> None:
    """Sample or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sample", "report"])
    parser.add_argument("places", nargs="+", help="sample: MODEL FILE OUT; report: OUT")
    arguments = parser.parse_args()
    if arguments.what == "sample":
        model, data, out = arguments.places
        sample(model, Path(data), Path(out))
    else:
        report(Path(arguments.places[0]))


if __name__ == "__main__":
    main()
