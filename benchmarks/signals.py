"""One ruler for signals: which number of a finished response tells wrong answers to a problem from right ones?

    python benchmarks/signals.py sample MODEL DATA OUT section.field=value …        (draws plainly; goes on where it stopped)
    python benchmarks/signals.py report OUT …

AUROC within a problem, and the same within strata of equal log-probability: what log-probability knows, a lower temperature
buys as well. Of segments: the paper's U and its terms, for the first segment, the last and the worst. What the same samples give
for one answer: `one_answer.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from e3rl.config import Config
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.sampling import group_entropies, roll_out, segment_signals
from e3rl.diagnose.statistics import wins_and_pairs
from e3rl.engine import sampling
from e3rl.engine.build import build_engine
from e3rl.lab.reward import graded_by_the_lab
from e3rl.models import Policy, load_policy, resolve_model_path
from e3rl.rewards.answers import extract_answer, vote
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.companions import find_companions
from e3rl.types import Group, Prompt, Trajectory

STRATA = 4
HEAD = "head learnt from all above"
TERMS = {"U": "U, paper", "entropy, U's": "entropy", "step, U's": "entropy step", "peak, U's": "entropy peak"}
"""Of each segment: the paper's U and its terms, as `e3rl diagnose` measures them."""


def with_certainty(logits_SV: torch.Tensor, rows: sampling.SamplingRows, uniforms_S: torch.Tensor) -> sampling.Samples:
    """A drawn token whose kept mass, which is 1 without truncation, is replaced by its self-certainty: how far the
    distribution is from one where all tokens are alike, −(1/V) Σ log(V p)."""
    found = sampling.sample(logits_SV, rows, uniforms_S)
    scaled_SV = logits_SV.float() / rows.temperature_S1
    certainty_S = scaled_SV.logsumexp(-1) - scaled_SV.mean(-1) - math.log(scaled_SV.shape[1])
    return found._replace(kept_mass_S=certainty_S)


def _window(values: np.ndarray, width: int) -> float:
    """Largest mean over any window."""
    width = min(width, len(values))
    return float(np.convolve(values, np.ones(width), "valid").max() / width)


def signals(trajectory: Trajectory, segments: Sequence[dict[str, float]], width: int) -> dict[str, float]:
    """What can be said of a response without its answer; the larger, the more suspicious. ``segments``: what `e3rl diagnose`
    measures of each; ``width``: tokens of windows and tails."""
    h, logp = np.asarray(trajectory.entropies, float), np.asarray(trajectory.logprobs, float)
    eps, certainty, ids = (
        np.concatenate([np.asarray(getattr(s.candidate, name)) for s in trajectory.segments])
        for name in ("perturbations", "kept_mass", "ids")
    )
    fours = list(zip(*(ids[i : len(ids) - 3 + i].tolist() for i in range(4)), strict=True)) if len(ids) > 3 else []
    found = {
        "entropy": h.mean(),
        "ε": eps.mean(),
        "entropy + 0.3 ε": h.mean() + 0.3 * eps.mean(),
        "−log p, mean": -logp.mean(),
        "−log p, sum": -logp.sum(),
        "self-certainty, less of it": -certainty.mean(),
        "self-certainty, least window": _window(-certainty, width),
        "entropy, largest": h.max(),
        "ε, largest": eps.max(),
        "entropy, worst window": _window(h, width),
        "−log p, worst window": _window(-logp, width),
        "entropy, tail": h[-width:].mean(),
        "−log p, tail": -logp[-width:].mean(),
        "entropy, second half": h[len(h) // 2 :].mean(),
        "ε, second half": eps[len(eps) // 2 :].mean(),
        "length": len(h),
        "repeats": 1.0 - len(set(fours)) / len(fours) if fours else 0.0,
    }
    for name, source in TERMS.items():
        values = [measured[source] for measured in segments]
        found |= {f"{name}, first": values[0], f"{name}, last": values[-1], f"{name}, worst": max(values)}
    return {name: float(value) for name, value in found.items()}


def _prompts(policy: Policy, data: str, config: Config, problems: int, instruction: str) -> list[Prompt]:
    """Some problems, evenly spread, each with the instruction below it."""
    chosen = spread(load_problems(data, config=config.data, split="eval"), problems)
    if instruction:
        chosen = [replace(p, prompt=f"{p.prompt}\n{instruction}") for p in chosen]
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    return render_prompts(chosen, policy.tokenizer, config.data, **limits)


def _answer(text: str, config: Config) -> str | None:
    """What agrees with a sibling: the final answer; in the lab what follows the last equals sign, or the whole path."""
    if config.rewards.functions == ("lab",):
        return text.strip().rpartition("=")[2]
    answer = extract_answer(text, config.rewards.unboxed)
    return answer and vote(answer)


def _records(group: Group, scorer: Scorer, policy: Policy, config: Config) -> Iterator[dict[str, Any]]:
    texts = [policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in group.trajectories]
    reference, width = group_entropies(group), config.rollout.segment_length // 2
    rewards = scorer.score(group.trajectories, texts)
    for trajectory, text, reward in zip(group.trajectories, texts, rewards, strict=True):
        segments = list(segment_signals(trajectory.segments, (), reference))
        yield {
            "problem": group.prompt.problem.id,
            "temperature": config.rollout.temperature,
            "right": bool(reward.right),
            "finish": trajectory.finish,
            "answer": _answer(text, config),
            "signals": signals(trajectory, segments, width),
        }


def sample(options: argparse.Namespace) -> None:
    """Draw what is missing, some problems at a time."""
    plain = ["rollout.erase=false", "rollout.top_p=1.0", "rollout.top_k=0"]
    saved = find_companions(resolve_model_path(options.model)).config((), [*plain, *options.overrides])
    config = graded_by_the_lab(saved, options.data)
    policy = load_policy(replace(config.model, path=options.model))
    prompts = _prompts(policy, options.data, config, options.problems, options.instruction)
    known = {r["problem"] for r in _read(options.out)} if options.out.exists() else set[str]()
    left = [p for p in prompts if p.problem.id not in known]
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    with (
        Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer,
        patch("e3rl.engine.torch.decode.sample", with_certainty),
    ):
        for start in range(0, len(left), options.together):
            groups = roll_out(engine, left[start : start + options.together], config)
            with options.out.open("a", encoding="utf-8") as file:
                for group in groups:
                    lines = [json.dumps(record) + "\n" for record in _records(group, scorer, policy, config)]
                    file.write("".join(lines))
            print(f"{len(prompts) - len(left) + start + len(groups)} of {len(prompts)} problems", flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def grouped(path: Path) -> list[list[dict[str, Any]]]:
    """The samples of each problem, in the file's order."""
    return [list(rows) for _, rows in itertools.groupby(_read(path), lambda r: r["problem"])]


Groups = Sequence[Sequence[dict[str, Any]]]
Kind = Callable[[dict[str, Any]], Any]


def _auroc(groups: Groups, name: str, kind: Kind = lambda r: None) -> tuple[float, float, float, int]:
    """AUROC among the samples of a problem that are of one kind, its 95 % bootstrap interval over problems, and its pairs."""
    won = np.zeros((len(groups), 2))
    for i, group in enumerate(groups):
        for same in {kind(r) for r in group}:
            rows = [r for r in group if kind(r) == same]
            scores, wrong = np.array([r["signals"][name] for r in rows]), np.array([not r["right"] for r in rows])
            won[i] += wins_and_pairs(scores, wrong)
    draws = np.random.default_rng(0).integers(0, len(won), (1000, len(won)))
    totals = won[draws].sum(axis=1)
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
        return float(won[:, 0].sum() / won[:, 1].sum()), float(low), float(high), int(won[:, 1].sum())


def _agreed(group: Sequence[dict[str, Any]]) -> None:
    """Adds the share of siblings with another answer, or none."""
    for r in group:
        same = sum(r["answer"] is not None and r["answer"] == other["answer"] for other in group)
        r["signals"]["siblings with another answer"] = 1 - (same - (r["answer"] is not None)) / (len(group) - 1)


def _headed(groups: Groups, names: Sequence[str]) -> None:
    """Adds a learnt head: logistic in the differences between wrong and right siblings, from the other half of the problems."""
    values = np.array([[r["signals"][name] for name in names] for group in groups for r in group])
    centre, spread_ = values.mean(0), values.std(0) + 1e-12
    for half in (0, 1):
        found = [
            [bad["signals"][name] - good["signals"][name] for name in names]
            for group in groups[1 - half :: 2]
            for bad, good in itertools.product(group, group)
            if good["right"] and not bad["right"]
        ]
        differences, weights = np.array(found).reshape(-1, len(names)) / spread_, np.zeros(len(names))
        for _ in range(500):  # gradient descent on the mean loss + |w|² / 20
            missed = 1 / (1 + np.exp(differences @ weights))
            weights -= 0.1 * (0.1 * weights - (missed[:, None] * differences).sum(0) / max(1, len(differences)))
        for group in groups[half::2]:
            for r in group:
                own = np.array([r["signals"][name] for name in names])
                r["signals"][HEAD] = float((own - centre) / spread_ @ weights)


def prepared(out: Path) -> list[list[dict[str, Any]]]:
    """The samples of each problem, with what needs all of them: the head, the siblings' answers and the strata of log p."""
    groups = grouped(out)
    rows = [r for group in groups for r in group]
    _headed(groups, list(rows[0]["signals"]))
    for group in groups:
        _agreed(group)
    edges = np.quantile([r["signals"]["−log p, sum"] for r in rows], np.linspace(0, 1, STRATA + 1)[1:-1])
    for r in rows:
        r["stratum"] = int(np.searchsorted(edges, r["signals"]["−log p, sum"]))
    return groups


def report(options: argparse.Namespace) -> None:
    """The tables: what the samples are, and AUROC by signal and file."""
    files = {out.stem: prepared(out) for out in options.outs}
    print("| samples | problems | T | Avg | Pass | finished |\n|" + " --- |" * 6)
    for name, groups in files.items():
        rows = [r for group in groups for r in group]
        right, passed = np.mean([r["right"] for r in rows]), np.mean([any(r["right"] for r in g) for g in groups])
        finished = np.mean([r["finish"] == "stop" for r in rows])
        print(f"| {name} | {len(groups)} × {len(groups[0])} | {rows[0]['temperature']:g} | {right:.3f} | {passed:.3f} "
              f"| {finished:.3f} |")  # fmt: skip
    kinds: dict[str, tuple[Kind, Kind]] = {
        "within a problem": (lambda r: None, lambda r: True),
        "within a problem, finished": (lambda r: None, lambda r: r["finish"] == "stop"),
        f"within a problem and a {STRATA}th of log p": (lambda r: r["stratum"], lambda r: True),
    }
    for title, (kind, chosen) in kinds.items():
        measured = {
            file: {
                name: _auroc([[r for r in group if chosen(r)] for group in groups], name, kind)
                for name in groups[0][0]["signals"]
            }
            for file, groups in files.items()
        }
        pairs = [f"{file}, {next(iter(found.values()))[3]} pairs" for file, found in measured.items()]
        print(f"\n| {title} | {' | '.join(pairs)} |\n|" + " --- |" * (1 + len(pairs)))
        for name in next(iter(measured.values())):
            cells = ["{:.2f} ({:.2f}–{:.2f})".format(*found[name][:3]) for found in measured.values()]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Sample or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    drawing = commands.add_parser("sample", help="draw samples and measure their signals")
    drawing.add_argument("model")
    drawing.add_argument("data")
    drawing.add_argument("out", type=Path)
    drawing.add_argument("overrides", nargs="*", metavar="section.field=value")
    drawing.add_argument("--problems", type=int, default=150)
    drawing.add_argument("--together", type=int, default=16, help="problems that are drawn before they are written")
    drawing.add_argument("--instruction", default="", help="a line below each problem")
    telling = commands.add_parser("report", help="print the tables")
    telling.add_argument("outs", nargs="+", type=Path, metavar="OUT")
    options = parser.parse_args()
    sample(options) if options.what == "sample" else report(options)


if __name__ == "__main__":
    main()
