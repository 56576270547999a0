"""Does the gap between erasing and reranking grow with the tokens spent? Long searches in mazes, at N plain answers' tokens.

    python benchmarks/late_maze.py --json out.json          (minutes on one quiet core)

Held-out problems, settings fixed beforehand. 'rerank' draws N answers for each one kept and keeps the calmest (entropy + 0.3 ε
of the whole answer). 'erase' judges segments by the same number against a quantile of the siblings' first candidates; where
it costs less than N answers, the rest of the tokens buys more erasable answers, of which the calmest are kept. Plain
decoding at lower temperatures stands beside them. Also: which signals tell a wrong first door, all after the same prefix.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_erasing import evaluated, interval, shown

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.diagnose.signals import late_suspicion
from e3rl.diagnose.statistics import within_prefix_auroc
from e3rl.lab.problems import load, step_correctness
from e3rl.models import Policy, load_policy
from e3rl.train.summary import environment
from e3rl.types import Problem, Trajectory

KEPT = 4
BUDGETS = (2, 4, 8, 16)
ERASABLE = "erase, quantile {:g}, at most {}"
ERASING = ((0.5, 5, 8), (0.2, 5, 16), (0.05, 15, 16))
"""Quantile, most erasures of a segment, answers to each problem. The first is for N = 2, the second for 4, the third above."""
FOR_BUDGET = dict(zip(BUDGETS, (0, 1, 2, 2), strict=True))
FIRST_MOVE = 2  # tokens: where it starts, and the door


@dataclass(frozen=True)
class Answers:
    """Answers to each problem, [P, K] each, and the tokens that one cost, erased ones included."""

    right: np.ndarray
    finished: np.ndarray
    suspicion: np.ndarray
    tokens: float

    def kept(self, drawn: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares of right and of finished answers by problem where of each ``drawn`` the ``KEPT`` calmest stay."""
        samples = self.right.shape[1]
        parts = [slice(i, i + drawn) for i in range(0, samples - drawn + 1, drawn)]
        shares = []
        for part in parts:
            order = self.suspicion[:, part].argsort(axis=1, kind="stable")[:, :KEPT]
            shares.append(
                [np.take_along_axis(table[:, part], order, 1).mean(1) for table in (self.right, self.finished)]
            )
        right_P, finished_P = np.mean(shares, axis=0)
        return right_P, finished_P


def configured(options: argparse.Namespace, *overrides: str) -> Config:
    sizes = (f"rollout.segment_length={options.limit}", "rollout.max_segments=1")
    given = (f"data.train={options.data}", "rollout.max_rows=64", *sizes, *overrides)
    return load_config(find_recipe("recommended"), [], given)


def answered(
    policy: Policy, options: argparse.Namespace, samples: int, temperature: float, *overrides: str
) -> tuple[Answers, Any]:
    """``samples`` answers to each problem; erasable where there are overrides."""
    config = configured(options, *overrides)
    config = replace(config, eval=replace(config.eval, num_samples=samples, temperature=temperature))
    done = evaluated(policy, options.data, "heldout", options.problems, config, erase=bool(overrides))
    suspicion = np.array([[late_suspicion(t) for t in row] for row in done.trajectories_PK])
    finished = np.array([[t.finish == "stop" for t in row] for row in done.trajectories_PK])
    tokens = done.record()["tokens"] / done.correct_PK.size
    return Answers(done.correct_PK, finished, suspicion, tokens), done.trajectories_PK


def erased(policy: Policy, options: argparse.Namespace, length: int) -> dict[str, Answers]:
    """Erasable answers in segments of so many tokens, each way of `ERASING`."""
    found = {}
    for share, most, samples in ERASING:
        sizes = (f"rollout.segment_length={length}", f"rollout.max_segments={options.limit // length}")
        way = (f"erasure.quantile={share}", f"erasure.max_erasures={most}")
        found[ERASABLE.format(share, most)] = answered(policy, options, samples, 1.0, *sizes, *way)[0]
    return found


def signals(policy: Policy, problems: Sequence[Problem], drawn: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
    """AUROC within a problem of numbers of growing sight: for a wrong first door, and for a wrong answer."""
    rows: dict[str, list[float]] = {}
    doors, names = list[bool](), list[str]()
    for problem, trajectories in zip(problems, drawn, strict=True):
        for t in trajectories:
            text = policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True)
            doors.append(not step_correctness(problem, text)[0].right)
            names.append(problem.id)
            eps = np.concatenate([s.candidate.perturbations for s in t.segments])
            for name, values in (("entropy", t.entropies), ("entropy + 0.3 ε", t.entropies + 0.3 * eps), ("ε", eps)):
                for sight in (FIRST_MOVE, 8, 16, 32):
                    rows.setdefault(f"{name}, first {sight} tokens", []).append(float(values[:sight].mean()))
                rows.setdefault(f"{name}, whole", []).append(float(values.mean()))
    wrong, problem_of = np.array(doors), np.array(names)
    return {
        name: vars_of(within_prefix_auroc(np.array(values), wrong, problem_of, problem_of))
        for name, values in rows.items()
    }


def vars_of(estimate: Any) -> dict[str, Any]:
    return {name: getattr(estimate, name) for name in ("value", "low", "high", "count")}


def told(right_P: np.ndarray, finished_P: np.ndarray) -> dict[str, Any]:
    """Avg, finish ratio, accuracy given finished (an answer that is cut off is never right)."""
    return {
        "avg": interval(right_P),
        "finished": float(finished_P.mean()),
        "right_if_finished": float(right_P.mean() / max(finished_P.mean(), 1e-9)),
    }


def compared(plain: Answers, erasable: Mapping[str, Answers]) -> dict[str, Any]:
    """Reranking and every way to erase at N plain answers' tokens, and the gap of the way that is fixed for that N."""
    rows: dict[str, Any] = {}
    gaps: dict[int, np.ndarray] = {}
    for n in BUDGETS:
        reranked = plain.kept(KEPT * n)
        row: dict[str, Any] = {"rerank": told(*reranked)}
        for index, (name, answers) in enumerate(erasable.items()):
            drawn = min(int(KEPT * n * plain.tokens / answers.tokens), answers.right.shape[1])
            if drawn < KEPT:
                continue
            kept = answers.kept(drawn)
            row[name] = told(*kept) | {"drawn": drawn, "spent": drawn * answers.tokens / KEPT / plain.tokens}
            row[name]["gap"] = interval(kept[0] - reranked[0])
            if index == FOR_BUDGET[n]:
                gaps[n] = kept[0] - reranked[0]
        rows[str(n)] = row
    low, high = (gaps[n] for n in (min(gaps), max(gaps)))
    slopes = np.polyfit(np.log2(list(gaps)), np.array(list(gaps.values())), 1)[0]
    return {
        "rows": rows,
        "gap": {n: interval(values) for n, values in gaps.items()},
        "gap, largest N − smallest": interval(high - low),
        "gap, a doubling of N": interval(slopes),
    }


def markdown(result: Mapping[str, Any]) -> str:
    lines = ["| plain, T | Avg | finished | right if finished | tokens |", "| --- | --- | --- | --- | --- |"]
    for t, row in result["plain"].items():
        cells = (f"{row['finished']:.2f}", f"{row['right_if_finished']:.3f}", f"{row['tokens']:.1f}")
        lines.append(f"| {t} | {shown(row['avg'])} | {' | '.join(cells)} |")
    for length, found in result["compared"].items():
        head = f"| N, segments of {length} | way | tokens × | Avg | finished | right if finished | − rerank |"
        lines += ["", head, "| --- " * 7 + "|"]
        for n, row in found["rows"].items():
            for name, cell in row.items():
                gap = shown(cell["gap"], "+") if "gap" in cell else ""
                spent = f"{cell.get('spent', float(n)):.2f}"
                numbers = f"{shown(cell['avg'])} | {cell['finished']:.2f} | {cell['right_if_finished']:.3f}"
                lines.append(f"| {n} | {name} | {spent} | {numbers} | {gap} |")
        for name in ("gap, largest N − smallest", "gap, a doubling of N"):
            lines += ["", f"{name}: {shown(found[name], '+')}"]
    lines += ["", "| signal of a wrong first door, same prefix | AUROC |", "| --- | --- |"]
    for name, e in result["signals"].items():
        value = "" if e["value"] is None else f"{e['value']:.2f} ({e['low']:.2f}–{e['high']:.2f})"
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="lab-maze")
    parser.add_argument("--data", default="lab:maze:4")
    parser.add_argument("--problems", type=int, default=32, help="held-out problems")
    parser.add_argument("--limit", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--segment-lengths", nargs="+", type=int, default=[32, 16], help="32 is half a right answer")
    parser.add_argument("--temperatures", nargs="*", type=float, default=[0.6, 0.3], help="of plain decoding beside 1")
    parser.add_argument("--cooler", type=int, default=8, help="answers to each problem at those")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    policy = load_policy(replace(configured(options).model, path=options.model))
    plain, drawn = answered(policy, options, KEPT * max(BUDGETS), 1.0)
    pools = {1.0: plain} | {t: answered(policy, options, options.cooler, t)[0] for t in options.temperatures}
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result: dict[str, Any] = {
        "environment": environment(),
        **settings,
        "plain": {f"{t:g}": told(a.right.mean(1), a.finished.mean(1)) | {"tokens": a.tokens} for t, a in pools.items()},
        "signals": signals(policy, load(options.data, "heldout", options.problems), drawn),
        "compared": {},
    }
    for length in options.segment_lengths:
        result["compared"][str(length)] = compared(plain, erased(policy, options, length))
        result["cpu_seconds"] = time.process_time() - started
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(markdown(result), flush=True)


if __name__ == "__main__":
    main()
