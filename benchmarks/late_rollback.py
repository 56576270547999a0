"""Where to go back to when a whole response is judged, and what a step tells when it is judged together with the next.

    python benchmarks/late_rollback.py --json out.json          (three minutes on one quiet core)

Unlike `late_variants.py`, which replays, this generates: going back to the middle of a response keeps its beginning. All
problems are of the training half. U is entropy + 0.3 ε; thresholds are quantiles of a problem's first attempts, and eq 17's
attempt penalty raises them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from late_erasing import configured, interval, opened, shown
from late_variants import DELTA, ETA, GROUP, arguments

from e3rl.diagnose.signals import LATE_EPS_WEIGHT
from e3rl.engine.protocol import AppendingEngine, Row, Sampling
from e3rl.lab.problems import grade
from e3rl.models import Policy, load_policy
from e3rl.train.summary import environment
from e3rl.types import Draw, Prompt

TOGETHER = 16
"""Problems that are generated at a time."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass
class Answer:
    """A response on its way: what the engine holds of it, and two numbers for each token."""

    row: Row
    problem: str
    sibling: int
    ids: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    perturbations: list[float] = field(default_factory=list)

    def suspicion(self) -> float:
        return _mean(self.entropies) + LATE_EPS_WEIGHT * _mean(self.perturbations)

    def copy(self) -> Answer:
        return replace(self, ids=[*self.ids], entropies=[*self.entropies], perturbations=[*self.perturbations])


class Desk:
    """Draws tokens for many answers at once and counts them."""

    def __init__(self, engine: AppendingEngine, limit: int, eos_ids: Sequence[int], seed: int) -> None:
        self.engine, self.limit, self.eos_ids, self.seed = engine, limit, frozenset(eos_ids), seed
        self.tokens = 0
        self._draws = itertools.count()

    def begin(self, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return [
            [Answer(row, p.problem.id, i) for i, row in enumerate(self.engine.prefill(p.ids, GROUP))] for p in prompts
        ]

    def ended(self, answer: Answer) -> bool:
        return len(answer.ids) >= self.limit or bool(answer.ids and answer.ids[-1] in self.eos_ids)

    def extend(self, answers: Sequence[Answer], length: int) -> None:
        """Draw on until every answer has ``length`` tokens or has ended."""
        number = next(self._draws)
        open_rows = {}
        for answer in answers:
            missing = min(length, self.limit) - len(answer.ids)
            if missing > 0 and not self.ended(answer):
                draw = Draw(self.seed, 0, answer.problem, answer.sibling, 0, number)
                self.engine.extend(answer.row, missing, draw, Sampling())
                open_rows[answer.row] = answer
        while open_rows:
            for row, candidate in self.engine.poll():
                answer = open_rows.pop(row)
                self.tokens += len(candidate.ids)
                answer.ids += candidate.ids.tolist()
                answer.entropies += candidate.entropies.tolist()
                answer.perturbations += candidate.perturbations.tolist()

    def cut(self, answer: Answer, length: int) -> None:
        self.engine.rollback(answer.row, length)
        for values in (answer.ids, answer.entropies, answer.perturbations):
            del values[length:]

    def put_back(self, answer: Answer, earlier: Answer) -> None:
        """Let the answer be again what it was."""
        self.cut(answer, 0)
        self.engine.append(answer.row, earlier.ids)
        answer.ids, answer.entropies, answer.perturbations = earlier.ids, earlier.entropies, earlier.perturbations

    def end(self, groups: Sequence[Sequence[Answer]]) -> None:
        for answer in itertools.chain.from_iterable(groups):
            self.engine.release(answer.row)


Way = Callable[[Desk, "list[list[Answer]]"], None]
"""Completes the answers of some problems, drawing again as it sees fit."""


def plain(desk: Desk, groups: list[list[Answer]]) -> None:
    desk.extend([answer for group in groups for answer in group], desk.limit)


def _again(
    desk: Desk,
    groups: Sequence[Sequence[Answer]],
    back_to: Callable[[Answer], int],
    length: int,
    judged: Callable[[Answer], float],
    share: float,
    erasures: int,
    from_best: bool,
) -> None:
    """Draw answers above the threshold of their group again, from where ``back_to`` says to ``length``. An answer that is
    never below it ends as its calmest attempt; ``from_best``: each retry also starts from that one, not from the last."""
    thresholds = [float(np.quantile([judged(a) for a in group], share)) for group in groups]
    best = {answer.row: answer.copy() for group in groups for answer in group}

    def suspicious(answer: Answer, threshold: float, attempt: int) -> bool:
        return judged(answer) > threshold * np.exp(ETA * attempt**DELTA)

    for attempt in range(erasures):
        retried = [a for g, level in zip(groups, thresholds, strict=True) for a in g if suspicious(a, level, attempt)]
        for answer in retried:
            desk.cut(answer, back_to(answer))
        desk.extend(retried, length)
        for answer in retried:
            if judged(answer) < judged(best[answer.row]):
                best[answer.row] = answer.copy()
            elif from_best:
                desk.put_back(answer, best[answer.row].copy())
    for group, level in zip(groups, thresholds, strict=True):
        for answer in group:
            if suspicious(answer, level, erasures):
                desk.put_back(answer, best[answer.row].copy())


def late(back_to: Callable[[Answer], int], *, from_best: bool = False, share: float = 0.2, erasures: int = 5) -> Way:
    """Judge whole responses."""

    def complete(desk: Desk, groups: list[list[Answer]]) -> None:
        plain(desk, groups)
        _again(desk, groups, back_to, desk.limit, Answer.suspicion, share, erasures, from_best)

    return complete


def by_segment(length: int, following: int = 0, *, share: float = 0.5, erasures: int = 3) -> Way:
    """Judge segments, their entropies together with those of ``following`` tokens behind them (eq 11 on both sides)."""

    def complete(desk: Desk, groups: list[list[Answer]]) -> None:
        for position in range(0, desk.limit, length):
            open_groups = [[a for a in g if len(a.ids) > position or not desk.ended(a)] for g in groups]
            open_groups = [group for group in open_groups if group]
            end = position + length
            stop = end + following
            desk.extend([answer for group in open_groups for answer in group], stop)

            def judged(answer: Answer, start: int = position, end: int = end, stop: int = stop) -> float:
                return _mean(answer.entropies[start:stop]) + LATE_EPS_WEIGHT * _mean(answer.perturbations[start:end])

            _again(desk, open_groups, partial(_fixed, position), stop, judged, share, erasures, from_best=True)

    return complete


def _fixed(position: int, _: Answer) -> int:
    return position


def _largest_eps(answer: Answer) -> int:
    return int(np.argmax(answer.perturbations))


def _before_largest_entropy(answer: Answer) -> int:
    return max(0, int(np.argmax(answer.entropies)) - 1)


def _start(_: Answer) -> int:
    return 0


WAYS: Mapping[str, Way] = {
    "never judged (plain)": plain,
    "each step by itself": by_segment(1),
    "each step with the next": by_segment(1, 1),
    "each step with the next, quantile 0.3, E_max = 5": by_segment(1, 1, share=0.3, erasures=5),
    "each step with the next two": by_segment(1, 2),
    "segments of 3": by_segment(3, share=0.2, erasures=5),
    "segments of 4": by_segment(4, share=0.2, erasures=5),
    "segments of 5": by_segment(5, share=0.2, erasures=5),
    "the whole, back to its largest ε": late(_largest_eps),
    "the whole, back to its largest ε, from the best so far": late(_largest_eps, from_best=True),
    "the whole, back to before its largest entropy": late(_before_largest_entropy),
    "the whole, back to its start": late(_start),
}


def generated(policy: Policy, family: str, problems: int, seed: int, way: Way) -> tuple[np.ndarray, float]:
    """Which answers are right, [problems, GROUP], and the tokens that one of them cost."""
    config = configured(family, ("", 1.0))
    limit = config.rollout.completion_limit
    prompts, engine = opened(policy, family, "train", problems, config)
    desk = Desk(cast(AppendingEngine, engine), limit, policy.eos_ids, seed)
    right = []
    for start in range(0, problems, TOGETHER):
        part = prompts[start : start + TOGETHER]
        groups = desk.begin(part)
        way(desk, groups)
        for prompt, group in zip(part, groups, strict=True):
            texts = [policy.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in group]
            right.append([grade(prompt.problem, text) for text in texts])
        desk.end(groups)
    return np.array(right), desk.tokens / (problems * GROUP)


def compared(policy: Policy, family: str, problems: int, seeds: int) -> dict[str, Any]:
    """Every way, means over seeds of the drawing; differences to the last way are paired by problem."""
    found = {name: [generated(policy, family, problems, s, way) for s in range(seeds)] for name, way in WAYS.items()}
    avg_P = {name: np.mean([right.mean(1) for right, _ in runs], axis=0) for name, runs in found.items()}
    pass_P = {name: np.mean([right.any(1) for right, _ in runs], axis=0) for name, runs in found.items()}
    last = list(WAYS)[-1]
    return {
        name: {
            "avg": interval(avg_P[name]),
            "pass": interval(pass_P[name]),
            "tokens": float(np.mean([tokens for _, tokens in runs])),
            "avg_difference": interval(avg_P[name] - avg_P[last]),
        }
        for name, runs in found.items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="times that everything is drawn anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    told = {"model": options.model, "problems": options.problems, "seeds": options.seeds}
    result: dict[str, Any] = {"environment": environment(), **told}
    policy = load_policy(replace(configured(options.families[0], ("", 1.0)).model, path=options.model))
    for family in options.families:
        rows = result[family] = compared(policy, family, options.problems, options.seeds)
        print(
            f"\n| {family}: judged, drawn again from | Avg@{GROUP} | Pass@{GROUP} | tokens | Avg − {list(WAYS)[-1]} |"
        )
        print("| --- | --- | --- | --- | --- |")
        for name, row in rows.items():
            cells = (shown(row["avg"]), shown(row["pass"]), f"{row['tokens']:.2f}", shown(row["avg_difference"], "+"))
            print(f"| {' | '.join((name, *cells))} |", flush=True)
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
