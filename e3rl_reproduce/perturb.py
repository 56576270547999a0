"""The measure and the views behind ERPO's figure 1: where is a model uncertain, and what does a change there do to its answers?

A right response is cut at a token, that token is replaced, and the model goes on from there. The tokens are the 5 % that
the model was most uncertain at, the 5 % that it was least uncertain at, and as many at random. Three kinds of replacement:
'uniform', any other token of the vocabulary; 'model', the model's own draw among all other tokens; and 'none', the token
itself, so that only the continuation is redrawn (the control).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e3rl.config import Config
from e3rl.data.loading import load_problems, spread
from e3rl.data.prompts import render_prompts
from e3rl.engine.build import build_engine
from e3rl.errors import UserError
from e3rl.evaluate.metrics import paired_difference
from e3rl.models import Policy
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Prompt, Trajectory
from e3rl_reproduce.cells import Measure
from e3rl_reproduce.measures import SEED, score
from e3rl_reproduce.output import Line, Panel, Plot, Table
from e3rl_reproduce.results import Results, estimate
from e3rl_reproduce.study import Scale, plain_exams
from e3rl_reproduce.views import NOTHING, text

PERTURB = "e3rl_reproduce.perturb:perturb"
WHERE = ("most uncertain", "least uncertain", "random")
KINDS = ("none", "uniform", "model")
_BINS = 40


@dataclass(frozen=True)
class _Change:
    """A right response, cut before ``position``, with another token there."""

    source: int
    where: str
    kind: str
    prompt: Prompt
    prefix: tuple[int, ...]


def positions(entropies_T: Sequence[float], share: float, rng: Random) -> dict[str, list[int]]:
    """The tokens to change, by where they are; at least one of each, never the last token of the response."""
    inner = range(len(entropies_T) - 1)  # the last ends the response: replacing it changes no reasoning
    count = max(1, math.ceil(share * len(inner)))
    ordered = sorted(inner, key=lambda t: entropies_T[t])
    return dict(zip(WHERE, (ordered[-count:], ordered[:count], rng.sample(inner, min(count, len(inner)))), strict=True))


@torch.no_grad()
def _other_tokens(policy: Policy, trajectory: Trajectory, banned: Sequence[int]) -> Tensor:
    """At each response position, the model's probabilities of all tokens but the one it drew and those that are banned."""
    ids = [*trajectory.prompt.ids, *trajectory.ids.tolist()]
    logits_TV = policy.model(torch.tensor([ids], device=policy.device)).logits[0, len(trajectory.prompt.ids) - 1 : -1]
    logits_TV[:, list(banned)] = -torch.inf
    logits_TV.scatter_(1, torch.tensor(ids[len(trajectory.prompt.ids) :], device=policy.device)[:, None], -torch.inf)
    return torch.softmax(logits_TV.double(), -1).cpu()


def _changes(policy: Policy, right: Sequence[Trajectory], share: float, rng: Random) -> list[_Change]:
    special = sorted({*policy.tokenizer.all_special_ids, *policy.eos_ids})
    ordinary = [i for i in range(len(policy.tokenizer)) if i not in special]
    changes = []
    for source, trajectory in enumerate(right):
        others_TV = _other_tokens(policy, trajectory, special)
        for where, places in positions(trajectory.entropies.tolist(), share, rng).items():
            for place in places:
                drawn = rng.choices(range(others_TV.shape[1]), others_TV[place].tolist())[0]
                kept = int(trajectory.ids[place])
                anything = rng.choice([i for i in ordinary if i != kept])
                for kind, token in zip(KINDS, (kept, anything, drawn), strict=True):
                    problem = trajectory.prompt.problem
                    name = f"{problem.id}/{source}/{where}/{kind}/{place}"
                    prefix = (*trajectory.ids[:place].tolist(), token)
                    prompt = Prompt(replace(problem, id=name), (*trajectory.prompt.ids, *prefix))
                    changes.append(_Change(source, where, kind, prompt, prefix))
    return changes


def _histogram(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    entropies = [h for t in trajectories for h in t.entropies.tolist()]
    top = max(entropies)
    counts = torch.histc(torch.tensor(entropies, dtype=torch.float64), _BINS, 0.0, top).int().tolist()
    certain = sum(h < 0.01 for h in entropies) / len(entropies)
    return {"edges": [top * i / _BINS for i in range(_BINS + 1)], "counts": counts, "below_0.01": certain}


def perturb(
    policy: Policy, config: Config, *, benchmarks: Mapping[str, str], problems: int, samples: int, share: float = 0.05
) -> dict[str, Any]:
    """Entropies of plain responses, and the accuracy of right responses after a change, by place and kind."""
    rollout = replace(config.rollout, erase=False, num_generations=samples)
    limits = {"context_limit": policy.context_length, "completion_limit": rollout.completion_limit}
    loaded = [
        p
        for source in benchmarks.values()
        for p in spread(load_problems(source, config=config.data, split="eval"), problems)
    ]
    prompts = render_prompts(loaded, policy.tokenizer, config.data, **limits)
    engine = build_engine(
        rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts) + rollout.completion_limit
    )
    with Scorer(config.rewards, max_completion_length=rollout.completion_limit) as scorer:

        def right(trajectories: Sequence[Trajectory], before: Sequence[tuple[int, ...]]) -> list[bool]:
            ids = [[*head, *t.ids.tolist()] for head, t in zip(before, trajectories, strict=True)]
            texts = [policy.tokenizer.decode(i, skip_special_tokens=True) for i in ids]
            return [reward.right is True for reward in scorer.score(trajectories, texts)]

        plain = GroupSettings(rollout, config.erasure, config.run.seed + SEED)
        found = [t for group in run_groups(engine, prompts, plain) for t in group.trajectories]
        found.sort(key=lambda t: (t.prompt.problem.id, t.sibling))
        solved = [t for t, good in zip(found, right(found, [()] * len(found)), strict=True) if good and len(t.ids) > 1]
        changes = _changes(policy, solved, share, Random(config.run.seed))
        single = replace(plain, rollout=replace(rollout, num_generations=1), step=1)
        after = {
            group.prompt.problem.id: group.trajectories[0]
            for group in run_groups(engine, [change.prompt for change in changes], single)
        }
        good = right([after[c.prompt.problem.id] for c in changes], [c.prefix for c in changes])
    return {
        "problems": len(prompts),
        "responses": len(found),
        "right": len(solved),
        "histogram": _histogram(found),
        "perturbed": {kind: _compare(changes, good, solved, kind) for kind in KINDS},
    }


def _compare(
    changes: Sequence[_Change], good: Sequence[bool], solved: Sequence[Trajectory], kind: str
) -> dict[str, Any]:
    """Accuracy by place, and the test of most against least uncertain, paired by problem."""
    by_problem: dict[str, dict[str, list[bool]]] = {}
    for change, fine in zip(changes, good, strict=True):
        if change.kind == kind:
            problem = solved[change.source].prompt.problem.id
            by_problem.setdefault(problem, {}).setdefault(change.where, []).append(fine)
    means = {p: {where: sum(v) / len(v) for where, v in places.items()} for p, places in by_problem.items()}
    if not means:
        raise UserError("the model answered nothing right: there is nothing to perturb")
    accuracy_P = {where: np.array([m[where] for m in means.values()]) for where in WHERE}
    accuracy = {where: float(values.mean()) for where, values in accuracy_P.items()}
    gap = paired_difference(accuracy_P["most uncertain"], accuracy_P["least uncertain"])
    return {
        "accuracy": accuracy,
        "problems": len(means),
        "p_value": gap.p,
        "gap": gap.mean,
        "gap_ci95": list(gap.interval),
    }


def perturbation_measures(scale: Scale) -> tuple[Measure, ...]:
    """The perturbation study on the untrained model: every right response has a dozen continuations, so few samples."""
    options = {"benchmarks": dict(scale.benchmarks), "problems": scale.problems, "samples": 2}
    return (Measure(PERTURB, "start", options),)


def _first(results: Results) -> tuple[str, Measure]:
    return results.rows[0].label, perturbation_measures(results.scale)[0]


def entropy_histogram(results: Results) -> list[Table | Plot]:
    """How often each entropy occurs, over the tokens of plain responses; one seed."""
    row, measure = _first(results)
    found = results.measurement(row, results.scale.seeds[0], measure)
    if found is None:
        return []
    histogram = found["values"]["histogram"]
    middles = tuple((a + b) / 2 for a, b in zip(histogram["edges"], histogram["edges"][1:], strict=False))
    share = tuple(count / sum(histogram["counts"]) for count in histogram["counts"])
    certain = histogram["below_0.01"]
    note = f"{100 * certain:.1f} % of the tokens have an entropy below 0.01 nats."
    panel = Panel("tokens", "entropy, nats", "share", (Line(row, middles, share),), "steps", log_y=True)
    return [Plot("Entropy of tokens", (panel,), note)]


def _perturbed(results: Results, kind: str, key: str, where: str | None = None) -> list[float]:
    """A value of the perturbation study, by seed."""
    row, measure = _first(results)

    def value(item: dict[str, Any]) -> float:
        found = item["values"]["perturbed"][kind][key]
        return float(found[where] if where else found)

    return list(results.by_seed(row, measure, value).values())


def perturbation_table(results: Results) -> list[Table | Plot]:
    """Accuracy of right responses after a change, by place; mean over seeds, each with its own test."""
    rows = []
    for kind in KINDS:
        means = [text(estimate(_perturbed(results, kind, "accuracy", where))) for where in WHERE]
        p_values = ", ".join(f"{p:.4f}" for p in _perturbed(results, kind, "p_value")) or NOTHING
        problems = ", ".join(f"{n:.0f}" for n in _perturbed(results, kind, "problems")) or NOTHING
        rows.append((kind, *means, p_values, problems))
    columns = ("replacement", *WHERE, "p, most against least, by seed", "problems")
    note = (
        "Right responses of the untrained model, cut at one of 5 % of their tokens; that token kept ('none'), replaced by any "
        "other ('uniform') or by the model's own draw among all others ('model'); the model goes on from there. Sign-flip "
        "test, paired by problem. The paper: perturbing the most uncertain tokens costs 35.2 % accuracy, p < 0.001."
    )
    return [Table("Accuracy of right responses after a change", columns, tuple(rows), note)]


def conciseness(results: Results) -> list[Table | Plot]:
    """Accuracy beside response length, by benchmark."""
    measure = plain_exams(results.scale)[0]
    rows = []
    for row in results.rows:
        for name in results.scale.benchmarks:
            length = results.estimate(row.label, measure, lambda x, n=name: x["values"][n]["length"])  # type: ignore[misc]
            right = results.estimate(row.label, measure, lambda x, n=name: score(x["values"][n], "avg", 1))  # type: ignore[misc]
            rows.append((row.label, name, text(right), text(length, 1)))
    return [Table("Accuracy and length", ("row", "benchmark", "accuracy", "tokens"), tuple(rows))]
