"""What a line of metrics.jsonl holds. `METRICS` is the format's definition; the docs and the report read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

METRICS: dict[str, str] = {
    "step": "training step, from 1",
    "epoch": "passes over the training problems so far",
    "reward": "mean reward of the step's trajectories, missing ones left out",
    "reward_std": "standard deviation of those rewards",
    "rewards": "as rewards/NAME/mean and rewards/NAME/std: reward function NAME's own values, before its weight",
    "accuracy": "share of trajectories whose first reward function gave at least 1",
    "reward_missing": "trajectories without a reward because a function failed on them, or none had an opinion",
    "reward_restarts": "reward workers that were killed or died in this step, each replaced by a new one",
    "degenerate_groups": "share of groups whose rewards are all equal: they carry no signal",
    "groups_kept": "groups that passed the filter and were trained on",
    "refills": "times that further prompts were rolled out in place of dropped groups",
    "dropped_tokens": "tokens generated for groups that the filter dropped; part of tokens",
    "finish_ratio": "share of trajectories that ended by themselves",
    "length": "mean response tokens",
    "length_min": "tokens of the shortest response",
    "length_max": "tokens of the longest response",
    "length_finished": "mean tokens of responses that ended by themselves",
    "segments": "mean committed segments of a response",
    "candidates": "candidates generated",
    "erasures": "candidates erased",
    "committed_tokens": "tokens of committed segments",
    "erased_tokens": "tokens of erased candidates",
    "turns": "mean assistant turns of a response; only with environments, as the next five",
    "calls": "mean tool calls of a response",
    "call_errors": "share of tool calls that failed, erased ones among them",
    "erased_turns": "turns that were erased after their calls",
    "seconds_tools": "seconds that tools took in this process, added up over responses, which wait for them beside each other",
    "environment_failures": "responses without a reward because their environment hung or died",
    "erase_rate": "erased candidates over all candidates",
    "r": "regeneration ratio, erased tokens over committed tokens (eq 31)",
    "forced_rate": "committed segments above their threshold because the budget was spent, over committed segments",
    "acceptance": "by segment index: share of first candidates that were accepted",
    "uncertainty": "by segment index: mean U of committed segments",
    "uncertainty_auroc": "share of pairs of siblings' committed segments of one index in which the one whose response got the "
    "lower reward has the larger U; absent without such pairs",
    "threshold": "by segment index: mean Theta that committed segments were judged by",
    "baseline": "by segment index: mean B_n, the baseline in Theta (eq 16)",
    "penalty": "by segment index: mean Gamma, Theta's factor for erasures so far (eq 17)",
    "modulation": "by segment index: mean phi, Theta's factor for the entropy's course (eq 18)",
    "advantage": "by segment index: mean advantage of its tokens",
    "entropy": "mean entropy of a generated token, nats, at erasure.entropy_temperature where that is set",
    "kept_mass": "mean probability mass that truncation left to sample from",
    "sign_flips": "share of positions whose advantage has the sign opposite to the sequence advantage",
    "loss": "loss of the step",
    "router_loss": "load-balancing loss of routers before its weight; only with train.router_loss",
    "kl": "mean per-token KL to the reference policy (k3); absent without one",
    "clip_fraction": "share of ratios outside the clip range where that cuts the gradient",
    "clip_low": "of the ratios, those below the range where the advantage is negative; objectives that clip ratios",
    "clip_high": "of the ratios, those above the range where the advantage is positive; objectives that clip ratios",
    "ratio": "mean probability ratio of the policy to the one that made the rollout",
    "gate": "SAPO: mean share of the unclipped gradient that is left",
    "gamma_weight": "VESPO: mean weight of a token's gradient, 1 where the response is as likely as when it was drawn",
    "bound_low": "BAPO: lower clip bound, mean over micro-batches",
    "bound_high": "BAPO: upper clip bound, mean over micro-batches",
    "score": "DisCO: mean score of a response",
    "over_kl_limit": "DisCO: share of responses beyond kl_limit",
    "kl_old": "DisCO: mean per-token KL from the policy that made the rollout",
    "logprob": "SFT: mean log-probability of a solution's token",
    "skipped": "1 where the step was left out because of NaN, infinite or exploding numbers: nothing was learnt; else 0",
    "grad_norm": "gradient norm before clipping",
    "learning_rate": "learning rate of the step",
    "mismatch_mean": "mean |log-probability by the engine - by the trainer| of a sampled token",
    "mismatch_max": "largest such difference",
    "mismatch_ess": "effective sample size, as a share, of trajectories reweighted from engine to trainer",
    "staleness": "optimizer updates between the weights that drew a candidate and those that learn from it, mean",
    "staleness_most": "the same of the oldest candidate; at most rollout.staleness steps' updates",
    "importance_weight": "mean weight of a token, engine to trainer (importance_correction) times 1/w (selection_cap); absent "
    "without a correction",
    "importance_limited": "share of tokens whose importance weight was above the cap",
    "tokens": "tokens generated in this step, erased and dropped ones included; 0 for demonstrations",
    "tokens_total": "tokens generated since the start, erased and dropped ones included",
    "tokens_per_second": "tokens generated in this step over the step's seconds",
    "seconds_rollout": "seconds spent generating; with rollout.staleness, those that training waited for it",
    "seconds_reward": "seconds spent on rewards",
    "seconds_train": "seconds spent scoring, in forward and backward passes and in the optimizer",
    "memory_mb": "peak memory of the process so far (of the GPU where there is one), MiB",
}


@dataclass(frozen=True)
class Update:
    """What one round of optimizer updates reports: metrics that add up, and the largest gradient norm."""

    means: dict[str, float]
    grad_norm: float
    learning_rate: float


class Means:
    """Weighted means that add up over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, pairs: Mapping[str, tuple[float, float]]) -> None:
        """Add (sum, count) pairs."""
        for name, (total, count) in pairs.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0.0) + count

    def of_ranks(self, gather: Callable[[Any], Iterable[Any]]) -> Means:
        """The means over all ranks; ``gather`` returns the values of every rank."""
        together = Means()
        for pairs in gather({name: (self._sums[name], count) for name, count in self._counts.items()}):
            together.add(pairs)
        return together

    def values(self) -> dict[str, float]:
        """The means of everything that was counted at least once."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def spread(values: Iterable[float]) -> float:
    """Sample standard deviation; NaN of fewer than two."""
    found = list(values)
    if len(found) < 2:
        return math.nan
    centre = mean(found)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in found) / (len(found) - 1))


def by_index(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """Means by index, as a list from index 0; indices that never occur up to the largest are NaN."""
    collected: dict[int, list[float]] = {}
    for index, value in pairs:
        collected.setdefault(index, []).append(value)
    return [mean(collected.get(i, [])) for i in range(max(collected, default=-1) + 1)]


def finite_or_none(value: object) -> object:
    """JSON has no NaN: it becomes null, inside lists too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [finite_or_none(v) for v in value]
    return value
