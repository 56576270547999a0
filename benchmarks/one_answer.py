"""One answer from several samples: at the tokens of N answers, the calmest, the commonest, and whole responses erased.

    python benchmarks/one_answer.py OUT … [--colder FILE]

OUT holds samples of `signals.py`, ``--colder`` samples of the same problems at a lower temperature. A response counts as calm by
entropy + 0.3 ε, or by a head that is learnt from the other half of the problems.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from signals import HEAD, Groups, grouped, prepared

JUDGES = ("entropy + 0.3 ε", HEAD)


def _calmest(group: Sequence[dict[str, Any]], n: int, name: str) -> float:
    """Chance that of n samples the calmest is right, over all choices of n."""
    order = sorted(group, key=lambda r: r["signals"][name])
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
        shares.append(float(np.mean([np.mean(c) for c in counts.values() if len(c) == most])) if counts else 0.0)
    return float(np.mean(shares))


def _erased(group: Sequence[dict[str, Any]], calm: float, retries: int, name: str) -> tuple[float, float]:
    """Chance of a right answer, and tokens, where a whole response that is not calm is drawn again; the last one stays.

    The samples stand for draws, in 200 random orders.
    """
    generator, right, tokens = np.random.default_rng(0), 0.0, 0.0
    for _ in range(200):
        for attempt, index in enumerate(generator.permutation(len(group))[: retries + 1]):
            tokens += group[index]["signals"]["length"]
            if group[index]["signals"][name] <= calm or attempt == retries:
                right += group[index]["right"]
                break
    return right / 200, tokens / 200


def decoded(groups: Groups, colder: Groups) -> None:
    """Right answers, one for each problem, at the tokens of N answers; intervals over problems."""
    samples = len(groups[0])
    plain = np.array([np.mean([r["right"] for r in group]) for group in groups])
    tokens = sum(float(np.mean([r["signals"]["length"] for r in group])) for group in groups)
    ways: dict[str, tuple[np.ndarray, float]] = {"plain": (plain, 1.0)}
    against = {"plain": plain}
    if colder:
        right = np.array([np.mean([r["right"] for r in group]) for group in colder])
        spent = sum(float(np.mean([r["signals"]["length"] for r in group])) for group in colder)
        cold = f"plain, T = {colder[0][0]['temperature']:g}"
        ways[cold], against[cold] = (right, spent / tokens), right
    for n in (n for n in (2, 3, 4, 8) if n <= samples):
        for by in JUDGES:
            ways[f"calmest of {n} by {by}"] = (np.array([_calmest(g, n, by) for g in groups]), n)
        ways[f"commonest of {n}"] = (np.array([_commonest(g, n) for g in groups]), n)
    for by, share, retries in ((b, *how) for b in JUDGES for how in ((0.5, 1), (0.5, samples - 1), (0.2, samples - 1))):
        found = []
        for i, group in enumerate(groups):  # the threshold comes from the other half of the problems
            others = [r["signals"][by] for g in groups[1 - i % 2 :: 2] for r in g]
            found.append(_erased(group, float(np.quantile(others, share)), retries, by))
        right, spent_P = np.array(found).T
        ways[f"erased by {by}, quantile {share:g}, at most {retries} times"] = (right, float(spent_P.sum() / tokens))
    print(f"| one answer | tokens × | right | − {' | − '.join(against)} |\n|" + " --- |" * (3 + len(against)))
    draws = np.random.default_rng(0).integers(0, len(groups), (1000, len(groups)))
    for way, (right, cost) in ways.items():
        cells = []
        for sign, values in (("", right), *(("+", right - other) for other in against.values())):
            low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
            cells.append(f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})")
        print(f"| {way} | {cost:.2f} | {' | '.join(cells)} |")


def main() -> None:
    """Print a table for each file of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--colder", type=Path, metavar="FILE")
    options = parser.parse_args()
    for out in options.outs:
        groups, colder = prepared(out), grouped(options.colder) if options.colder else []
        if colder:  # may hold some of the problems, in their order
            names = [group[0]["problem"] for group in colder]
            groups = [group for group in groups if group[0]["problem"] in names]
            if [group[0]["problem"] for group in groups] != names:
                raise SystemExit(f"{options.colder} holds samples of problems that are not in {out}")
        print(f"\n{out.stem}, {len(groups)} problems\n")
        decoded(groups, colder)


if __name__ == "__main__":
    main()
