"""Run directories for tests, written through the library's own config, ledger and log functions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from e3rl.config import Config, build_config
from e3rl.equations.threshold import attempt_penalty
from e3rl.rollout.turns import given
from e3rl.train.ledger import ledger_rows, write_ledger
from e3rl.train.lessons import Lesson, unscored
from e3rl.train.packing import TrainSequence, erased_sequences, trajectory_sequence
from e3rl.train.run_directory import RunDirectory
from e3rl.types import (
    Candidate,
    Erasure,
    Group,
    Judgement,
    Observed,
    Problem,
    Prompt,
    Reward,
    RewardedGroup,
    Segment,
    Threshold,
    ToolResult,
    Trajectory,
    Uncertainty,
    Verdict,
)

WORDS = ["4", "7", "12", "35", "+", "-", "=", ";", "\n", " so", " the", " sum", " is", " wait", ",", "A:", "<eos>"]


class Words:
    """A tokenizer whose tokens are words; ones it does not know yet are added."""

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self.words = [*WORDS, *extra]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[i] for i in ids)

    def ids(self, *words: str) -> tuple[int, ...]:
        return tuple(self.words.index(w) for w in words)


def run_config(directory: Path, **sections: dict[str, Any]) -> Config:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": directory.name, "output_dir": str(directory.parent)},
        "rollout": {"num_generations": 4, "segment_length": 6, "max_segments": 4},
        "train": {"steps": 40, "prompts_per_step": 4, "learning_rate": 1e-4},
    }
    for name, table in sections.items():
        tables[name] = tables.get(name, {}) | table
    return build_config(tables)


def candidate(draw: random.Random, ids: Sequence[int], heat: float = 1.0, ended: bool = False) -> Candidate:
    entropies = tuple(min(2.8, draw.expovariate(1.6) * heat) for _ in ids)
    perturbations = tuple(h * draw.random() * 0.8 if draw.random() < 0.3 else 0.0 for h in entropies)
    logprobs = tuple(-0.35 * h - e for h, e in zip(entropies, perturbations, strict=True))
    return Candidate(
        tuple(ids), logprobs, entropies, perturbations, tuple(1.0 for _ in ids), tuple(1 for _ in ids), ended
    )


def judged(made: Candidate, baseline: float, attempt: int, verdict: Verdict) -> Judgement:
    base = sum(made.entropies) / len(made.entropies)
    steps = [abs(a - b) for a, b in zip(made.entropies, made.entropies[1:], strict=False)]
    gradient, extremum = 0.5 * sum(steps) / max(1, len(steps)), 0.1 / (1 + math.exp(-max(made.entropies)))
    noise = sum(made.perturbations) / len(made.perturbations)
    uncertainty = Uncertainty(base + gradient + extremum + noise, base, gradient, extremum, noise, base)
    penalty = float(attempt_penalty(attempt, 0.05, 1.5))
    over = {Verdict.COMMIT: 1.3, Verdict.ERASE: 0.8, Verdict.FORCED: 0.9}[verdict]
    total = uncertainty.total * over
    return Judgement(uncertainty, Threshold(total, total / penalty / 1.02, penalty, 1.02), attempt, verdict)


def trajectory(
    draw: random.Random, tokenizer: Words, prompt: Prompt, sibling: int, segments: int, erase: bool
) -> Trajectory:
    made: list[Segment] = []
    erasures: list[Erasure] = []
    start = 0
    end = tokenizer.words.index("<eos>")
    for n in range(segments):
        attempts = draw.choice([0, 0, 0, 1, 2, 5]) if erase else 0
        for attempt in range(attempts):
            bad = candidate(draw, [draw.randrange(end) for _ in range(6)], heat=1.6)
            erasures.append(Erasure(n, start, bad, judged(bad, 1.0, attempt, Verdict.ERASE)))
        last = n == segments - 1
        ids = [draw.randrange(end) for _ in range(draw.randrange(2, 6) if last else 6)] + ([end] if last else [])
        good = candidate(draw, ids, ended=last)
        verdict = Verdict.FORCED if attempts == 5 else Verdict.COMMIT
        made.append(Segment(n, good, judged(good, 1.0, attempts, verdict) if erase else None))
        start += len(ids)
    return Trajectory(prompt, sibling, tuple(made), tuple(erasures), "stop" if draw.random() < 0.9 else "length")


def lesson(sequence: TrainSequence, advantages: Sequence[float], shares: Sequence[float] | None = None) -> Lesson:
    """A sequence that was trained on with these advantages and shares."""
    scores = replace(unscored(sequence), shares_T=None if shares is None else torch.tensor(shares))
    return Lesson(sequence, scores, None, torch.tensor(advantages), 1)


def made_lessons(draw: random.Random, groups: Sequence[RewardedGroup]) -> list[Lesson]:
    """Advantages constant in a segment, of which some flip the sign; shares that add up to 1; contrast."""
    return [x for number, group in enumerate(groups) for x in _lessons_of(draw, group, number)]


def _lessons_of(draw: random.Random, group: RewardedGroup, number: int) -> list[Lesson]:
    known = [r.value or 0.0 for r in group.rewards]
    average = sum(known) / len(known)
    found: list[Lesson] = []
    for item, value in zip(group.group.trajectories, known, strict=True):
        by_segment = [(value - average) * 2 * draw.uniform(-0.3, 1.2) for _ in item.segments]
        advantages = [a for a, length in zip(by_segment, item.segment_lengths, strict=True) for _ in range(length)]
        raw = [draw.random() + 0.05 for _ in advantages]
        found.append(lesson(trajectory_sequence(item, number), advantages, [x / sum(raw) for x in raw]))
        for erased in erased_sequences(item, number):
            found.append(lesson(erased, [-1.0 if value > 0 else 0.0]))
    return found


def rewarded_group(
    draw: random.Random, tokenizer: Words, problem: str, config: Config, skill: float, answer: str | None = "43"
) -> RewardedGroup:
    words = tokenizer.ids("12", "+", "35", "-", "4", "=")
    prompt = Prompt(Problem(problem, "12+35-4=", answer=answer), words)
    made, rewards = [], []
    for sibling in range(config.rollout.num_generations):
        segments = draw.randrange(2, config.rollout.max_segments + 1)
        made.append(trajectory(draw, tokenizer, prompt, sibling, segments, config.rollout.erase))
        value = float(draw.random() < skill)
        failed = draw.random() < 0.01
        error = "math: the answer could not be parsed in 5 s" if failed else None
        rewards.append(Reward(None if failed else value, {"math": None if failed else value}, error))
    return RewardedGroup(Group(prompt, tuple(made), policy_version=0), tuple(rewards))


def write_rollouts(run: Path, step: int, groups: Sequence[RewardedGroup], tokenizer: Words) -> None:
    draw = random.Random(step)
    write_ledger(run, step, ledger_rows(step, groups, made_lessons(draw, groups), tokenizer))


def metrics_record(draw: random.Random, step: int, steps: int, config: Config) -> dict[str, Any]:
    progress = step / steps

    def near(value: float, noise: float = 0.08) -> float:
        return value * (1 + noise * draw.gauss(0, 1))

    n = config.rollout.max_segments
    record = {
        "step": step,
        "epoch": 0.05 * step,
        "reward": near(0.3 + 0.5 * progress),
        "accuracy": min(1.0, near(0.3 + 0.5 * progress)),
        "reward_missing": 0,
        "degenerate_groups": min(1.0, near(0.25, 0.3)),
        "finish_ratio": 0.95,
        "length": near(22 - 4 * progress),
        "segments": near(3.4),
        "entropy": near(0.7 - 0.3 * progress),
        "kl": near(0.02 * progress),
        "clip_fraction": near(0.04),
        "grad_norm": near(0.8, 0.2),
        "sign_flips": near(0.12),
        "mismatch_mean": 1e-6,
        "mismatch_ess": 1.0,
        "loss": near(-0.01),
        "tokens": 4000,
        "committed_tokens": 3500,
        "tokens_total": 4000 * step,
        "tokens_per_second": near(700.0),
        "seconds_rollout": near(4.0),
        "seconds_reward": near(0.2),
        "seconds_train": near(1.8),
        "memory_mb": 812.0,
        "advantage": [near(0.1 * (n - i)) for i in range(n)],
        **{f"clip_fraction/segment_{i}": near(0.02 * (i + 1)) for i in range(n)},
    }
    if config.rollout.erase:
        record |= {
            "erase_rate": near(0.18 - 0.1 * progress),
            "r": near(0.2 - 0.1 * progress),
            "forced_rate": near(0.02),
            "acceptance": [min(1.0, near(0.75 + 0.05 * i)) for i in range(n)],
            "uncertainty": [near(1.1 - 0.1 * i - 0.3 * progress) for i in range(n)],
            "threshold": [near(1.5 - 0.1 * i - 0.3 * progress) for i in range(n)],
            "baseline": [near(1.4 - 0.1 * i - 0.3 * progress) for i in range(n)],
            "penalty": [near(1.03, 0.01) for _ in range(n)],
            "modulation": [near(1.01, 0.02) for _ in range(n)],
        }
    return record


def evaluation_record(draw: random.Random, step: int, steps: int, mode: str) -> dict[str, Any]:
    average = 0.35 + 0.4 * step / steps + (0.05 if mode == "erasable" else 0) + 0.01 * draw.gauss(0, 1)
    passed = min(1.0, average + 0.2)
    return {
        "step": step,
        "mode": mode,
        "avg@8": average,
        "pass@8": passed,
        "ci95": [average - 0.04, average + 0.04],
        "pass_ci95": [passed - 0.06, min(1.0, passed + 0.05)],
        "problems": 96,
        "samples": 8,
        "missing": 0,
        "tokens": 20000,
        "finish_ratio": 0.97,
        "length": 21.0,
        "erase_rate": 0.1 if mode == "erasable" else 0.0,
        "r": 0.1 if mode == "erasable" else 0.0,
    }


def many_rollouts(run: Path, steps: int, groups: int, config: Config) -> int:
    """Ledgers of ``steps`` steps that hold the same rollouts but for the step; returns how many rollouts that is."""
    tokenizer, draw = Words(), random.Random(0)
    made = [rewarded_group(draw, tokenizer, f"p{i:03d}", config, 0.5) for i in range(groups)]
    rows = ledger_rows(0, made, made_lessons(draw, made), tokenizer)
    for step in range(1, steps + 1):
        numbers = pa.array([step] * rows.num_rows, pa.int32())
        write_ledger(run, step, rows.set_column(0, rows.schema.field(0), numbers))
    return steps * len(rows)


HOSTILE = "</script><script>window.hacked=1</script><!--<img src=x onerror=window.hacked=1>&\u2028"


def hostile_run(directory: Path) -> SyntheticRun:
    """A run whose problem, answer, response, erasures, reward names and errors are all an attack on the page."""
    made = SyntheticRun(directory)
    tokenizer, draw = Words(), random.Random(2)
    tokenizer.words = [HOSTILE, "<eos>"]
    prompt = Prompt(Problem(HOSTILE, HOSTILE, answer=HOSTILE), (0,))
    response = trajectory(draw, tokenizer, prompt, 0, 3, erase=True)
    reward = Reward(None, {HOSTILE: None, "other": 1.0}, error=HOSTILE)
    write_rollouts(made.path, 1, [RewardedGroup(Group(prompt, (response,), 0), (reward,))], tokenizer)
    return made


def tool_run(directory: Path) -> SyntheticRun:
    """A run with one response: a turn whose call failed was erased (and an attempt within it before), then the call worked."""
    made = SyntheticRun(directory)
    words = Words(["add(12)", "add(12,35)", "[error]", "[47]"])
    draw = random.Random(3)
    prompt = Prompt(Problem("sum", "12+35=", answer="47"), words.ids("12", "+", "35", "="))
    attempt = candidate(draw, words.ids(" wait", " wait"))
    bad = candidate(draw, words.ids(" so", "add(12)", "<eos>"), ended=True)
    failed = Observed((ToolResult("add", '{"a": 12}', "{'error': 'b is missing'}", failed=True),), 0, 1.0)
    against = Judgement(Uncertainty(1.0, 0, 0, 0, 0, 0), Threshold(0.5, 0.5, 1.0, 1.0), 0, Verdict.ERASE)
    good = candidate(draw, words.ids(" so", "add(12,35)", "<eos>"), ended=True)
    told = Observed((ToolResult("add", '{"a": 12, "b": 35}', "47"),), 0)
    last = candidate(draw, words.ids("A:", "4", "7", "<eos>"), ended=True)
    response = Trajectory(
        prompt,
        0,
        (
            Segment(0, good, judged(good, 1.0, 0, Verdict.COMMIT)),
            Segment(1, given(words.ids("[47]")), None, told),
            Segment(2, last, judged(last, 1.0, 0, Verdict.COMMIT)),
        ),
        (Erasure(0, 0, attempt, judged(attempt, 1.0, 0, Verdict.ERASE)), Erasure(0, 0, bad, against, failed)),
        "stop",
    )
    group = RewardedGroup(Group(prompt, (response,), 0), (Reward(1.0, {"math": 1.0}),))
    write_rollouts(made.path, 1, [group], words)
    return made


class SyntheticRun:
    """A run that goes on by as many steps as it is told to."""

    def __init__(self, directory: Path, **sections: dict[str, Any]) -> None:
        self.config = run_config(directory, **sections)
        self.directory = RunDirectory.create(self.config)
        self.path = self.directory.path
        self.tokenizer = Words()
        self.draw = random.Random(self.config.run.seed)
        self.done = 0
        self.evaluate()

    def evaluate(self) -> None:
        for mode in ("plain", "erasable"):
            record = evaluation_record(self.draw, self.done, self.config.train.steps, mode)
            self.directory.append("evaluations.jsonl", record)

    def step(self) -> None:
        self.done += 1
        config, skill = self.config, 0.3 + 0.5 * self.done / self.config.train.steps
        groups = [
            rewarded_group(self.draw, self.tokenizer, f"chain-{self.draw.randrange(1000):04d}-{i}", config, skill)
            for i in range(config.train.prompts_per_step)
        ]
        write_rollouts(self.path, self.done, groups, self.tokenizer)
        record = metrics_record(self.draw, self.done, config.train.steps, config)
        self.directory.append("metrics.jsonl", record)

    def go(self, steps: int, evaluate_every: int = 10) -> SyntheticRun:
        for _ in range(steps):
            self.step()
            if self.done % evaluate_every == 0:
                self.evaluate()
        return self
