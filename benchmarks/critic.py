"""Does the critic (`erasure.metric = "value"`) know more of a segment than entropy + 0.3 ε, and more than its log-probability?

    python benchmarks/critic.py lab:path:2 --problems 240 --json out.json

Plain rollouts of the embedded model with their rewards teach a head on one half of the problems, a step of 8 groups at a time
as in training; it judges the other half, and the other way round. Judged are draws from one prefix (a random committed prefix
of each first sample, drawn on ``--retries`` times to the end), and whole responses to one problem, each against its final
answer. A figure is the share of wrong-right pairs that are put in order, with a 95 % interval over problems; 'within log π'
counts the pairs alone whose log-probabilities lie in one fifth of all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.diagnose.sampling import choose_forks, firsts, prefix_prompt, roll_out
from e3rl.diagnose.statistics import RESAMPLES, resampled, wins_and_pairs
from e3rl.engine.build import build_engine
from e3rl.engine.protocol import Engine
from e3rl.files import write_json
from e3rl.models import Policy, load_policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.value import PRIOR, ValueHead, features
from e3rl.train.summary import environment
from e3rl.types import Candidate, Group, Prompt, RewardedGroup

FIFTHS = 5


@dataclass(frozen=True)
class Seen:
    """A judged candidate: what it is compared within, its features, its log-probability, and whether its response was wrong."""

    problem: int
    prefix: str
    features_F: list[float]
    logprob: float
    wrong: bool


def configured(data: str, segment_length: int, segments: int) -> Config:
    return load_config(
        overrides=[
            "model.path=lab",
            'rewards.functions=["lab"]',
            f"data.train={data}",
            "rollout.max_rows=128",
            f"rollout.segment_length={segment_length}",
            f"rollout.max_segments={segments}",
        ]
    )


def rewarded(groups: Sequence[Group], policy: Policy, config: Config) -> list[RewardedGroup]:
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        found = []
        for group in groups:
            texts = [policy.tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in group.trajectories]
            found.append(RewardedGroup(group, tuple(scorer.score(group.trajectories, texts))))
    return found


def forks(
    engine: Engine, prompts: Sequence[Prompt], groups: Sequence[Group], policy: Policy, config: Config, retries: int
) -> list[Seen]:
    """Draws from one prefix of a first sample of each problem, judged at their first segment."""
    one = [replace(g, trajectories=g.trajectories[:1]) for g in groups]
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        samples, _ = firsts(one, scorer, policy.tokenizer, by_steps=False)
        seen, places = [], {p.problem.id: n for n, p in enumerate(prompts)}
        chosen = choose_forks(samples, config.run.seed)
        for n in sorted({n for _, n in chosen}):
            here = [first for first, at in chosen if at == n]
            rest = config.rollout.completion_limit - n * config.rollout.segment_length
            rollout = replace(config.rollout, num_generations=retries, max_completion_length=rest)
            drawn = roll_out(engine, [prefix_prompt(f, n) for f in here], replace(config, rollout=rollout))
            for first, group in zip(here, drawn, strict=True):
                earlier = first.trajectory.segments[:n]
                before = [i for s in earlier for i in s.candidate.ids.tolist()]
                history = [float(s.candidate.entropies.mean()) for s in earlier]
                texts = [
                    policy.tokenizer.decode([*before, *t.ids.tolist()], skip_special_tokens=True)
                    for t in group.trajectories
                ]
                asked = [replace(t, prompt=first.trajectory.prompt) for t in group.trajectories]
                problem = places[first.trajectory.prompt.problem.id]
                for t, reward in zip(asked, scorer.score(asked, texts), strict=True):
                    seen.append(
                        _seen(problem, group.prompt.problem.id, t.segments[0].candidate, history, not reward.right)
                    )
    return seen


def _seen(problem: int, prefix: str, candidate: Candidate, history: Sequence[float], wrong: bool) -> Seen:
    return Seen(problem, prefix, features(candidate, history), float(candidate.logprobs.sum()), wrong)


def learnt(items: Sequence[RewardedGroup]) -> ValueHead:
    head = PRIOR
    for start in range(0, len(items), 8):
        head = head.taught(items[start : start + 8])
    return head


def judged(seen: Sequence[Seen], heads: Sequence[ValueHead]) -> dict[str, np.ndarray]:
    """Scores by signal; ``heads[k]`` judges the problems of half k."""
    return {
        "entropy": np.array([s.features_F[0] for s in seen]),
        "ε": np.array([s.features_F[1] for s in seen]),
        "−log π": np.array([-s.logprob for s in seen]),
        "entropy + 0.3 ε": np.array([PRIOR.suspicion(s.features_F) for s in seen]),
        "critic": np.array([heads[s.problem % 2].suspicion(s.features_F) for s in seen]),
    }


def ordered(seen: Sequence[Seen], scores: dict[str, np.ndarray], stratum: Callable[[Seen], Any]) -> dict[str, Any]:
    """Share of pairs in order for each signal, and the critic's lead over entropy + 0.3 ε, with intervals over problems."""
    members: dict[tuple[str, Any], list[int]] = {}
    for index, each in enumerate(seen):
        members.setdefault((each.prefix, stratum(each)), []).append(index)
    wrong, problems = np.array([s.wrong for s in seen]), max(s.problem for s in seen) + 1
    wins = {name: np.zeros(problems) for name in scores}
    pairs = np.zeros(problems)
    for chosen in members.values():
        for name, values in scores.items():
            won, compared = wins_and_pairs(values[chosen], wrong[chosen])
            wins[name][seen[chosen[0]].problem] += won
        pairs[seen[chosen[0]].problem] += compared
    rows = resampled(problems, 0)
    shares = {name: won[rows].sum(1) / np.maximum(pairs[rows].sum(1), 1) for name, won in wins.items()}
    found: dict[str, Any] = {name: _told(won.sum() / pairs.sum(), shares[name]) for name, won in wins.items()}
    lead = (wins["critic"] - wins["entropy + 0.3 ε"]).sum() / pairs.sum()
    found["critic − (entropy + 0.3 ε)"] = _told(lead, shares["critic"] - shares["entropy + 0.3 ε"])
    return {**found, "pairs": int(pairs.sum())}


def _told(value: float, drawn: np.ndarray) -> str:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def tables(seen: Sequence[Seen], heads: Sequence[ValueHead]) -> dict[str, Any]:
    scores, logprobs = judged(seen, heads), [s.logprob for s in seen]
    edges = np.quantile(logprobs, np.linspace(0, 1, FIFTHS + 1)[1:-1])
    return {
        "all pairs": ordered(seen, scores, lambda s: 0),
        "within log π": ordered(seen, scores, lambda s: int(np.searchsorted(edges, s.logprob))),
    }


def measured(data: str, problems: int, retries: int, split: Literal["train", "eval"]) -> dict[str, Any]:
    """Both questions on one family."""
    found: dict[str, Any] = {}
    policy = load_policy(load_config(overrides=["model.path=lab"]).model)
    for name, length, count in (("a segment of 2 tokens, same prefix", 2, 8), ("whole response, same problem", 16, 1)):
        config = configured(data, length, count)
        chosen = spread(load_problems(data, config=config.data, split=split), problems)
        limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
        prompts = render_prompts(chosen, policy.tokenizer, config.data, **limits)
        engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts) + 16)
        items = rewarded(roll_out(engine, prompts, config), policy, config)
        heads = [learnt(items[1 - half :: 2]) for half in (0, 1)]
        if count > 1:
            seen = forks(engine, prompts, [i.group for i in items], policy, config, retries)
        else:
            graded = [
                (n, t, r) for n, i in enumerate(items) for t, r in zip(i.group.trajectories, i.rewards, strict=True)
            ]
            seen = [_seen(n, str(n), t.segments[0].candidate, (), not r.right) for n, t, r in graded]
        rights = [bool(r.right) for i in items for r in i.rewards]
        found[name] = {
            "accuracy": f"{np.mean(rights):.3f}",
            "segments": f"{np.mean([len(t.segments) for i in items for t in i.group.trajectories]):.2f}",
            **tables(seen, heads),
            "weights": [[round(w, 3) for w in h.weights] for h in heads],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--problems", type=int, default=240)
    parser.add_argument("--retries", type=int, default=16)
    parser.add_argument("--split", choices=("train", "eval"), default="eval")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    began = time.process_time()
    found = {data: measured(data, options.problems, options.retries, options.split) for data in options.data}
    for data, ways in found.items():
        for way, parts in ways.items():
            print(data, way, *(f"\n  {key}: {value}" for key, value in parts.items()), flush=True)
    write_json(
        options.json,
        {"found": found, "resamples": RESAMPLES, "cpu_seconds": time.process_time() - began, "machine": environment()},
    )


if __name__ == "__main__":
    main()
