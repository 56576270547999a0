"""Health of a run: rules over its logs, each giving one sentence that says what to do.

Pure functions from the records of metrics.jsonl and evaluations.jsonl and the settings to findings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from e3rl.config import Config
from e3rl.evaluate.figures import overall
from e3rl.train.metrics import mean

Level = Literal["bad", "warn", "note", "good"]
Record = Mapping[str, Any]

RECENT = 10
"""Number of steps that 'now' and 'at first' are each averaged over; half of a shorter run's."""
FEWEST = 4
"""Steps that say something of a change."""


@dataclass(frozen=True)
class Finding:
    """One sentence about a run, and its severity."""

    level: Level
    text: str


@dataclass(frozen=True)
class Logs:
    """The input of the rules."""

    metrics: Sequence[Record]
    evaluations: Sequence[Record]
    config: Config

    def values(self, name: str) -> list[float]:
        """The metric's finite values in the order of the steps."""
        return [r[name] for r in self.metrics if isinstance(r.get(name), int | float)]

    @property
    def steps(self) -> int:
        """How many steps 'now' and 'at first' are means of."""
        return min(RECENT, max(1, len(self.metrics) // 2))

    def now(self, name: str) -> float:
        """Mean of the last steps; NaN if there are no values (every comparison with it is false)."""
        return mean(self.values(name)[-self.steps :])

    def at_first(self, name: str) -> float:
        """Mean of the first steps."""
        return mean(self.values(name)[: self.steps])

    def long_enough(self) -> bool:
        """Whether 'now' and 'at first' tell of a change."""
        return self.steps >= FEWEST


Rule = Callable[[Logs], Finding | None]


def not_finite(logs: Logs) -> Finding | None:
    broken = [r["step"] for r in logs.metrics if ("loss" in r and r["loss"] is None) or r.get("grad_norm", 0) is None]
    if not broken:
        return None
    return Finding(
        "bad",
        f"Loss or gradient was not a finite number at {_steps(broken)}. Lower train.learning_rate, and check that the "
        "model's weights load without warnings.",
    )


def rewards_missing(logs: Logs) -> Finding | None:
    missing = sum(logs.values("reward_missing"))
    if not missing:
        return None
    return Finding(
        "warn",
        f"The reward function failed on {missing:.0f} trajectories; they were left out, not counted as 0. The rollouts "
        "below say why (filter: reward missing).",
    )


def rewards_restart(logs: Logs) -> Finding | None:
    restarts = sum(logs.values("reward_restarts"))
    if not restarts:
        return None
    return Finding(
        "warn",
        f"A reward worker was killed or died, and was restarted, {restarts:.0f}×. The rollouts below whose reward is "
        "missing say why; a slow function needs a larger rewards.timeout.",
    )


def reward_collapsed(logs: Logs) -> Finding | None:
    steps, first, last = logs.steps, logs.at_first("reward"), logs.now("reward")
    if not (logs.long_enough() and first > 0.1 and last < 0.2 * first):
        return None
    return Finding(
        "bad",
        f"Reward fell from {first:.3f} in the first {steps} steps to {last:.3f} in the last {steps}: the policy has diverged. "
        "Lower train.learning_rate, or raise train.warmup_steps; the model of the last step is not worth keeping.",
    )


def no_signal(logs: Logs) -> Finding | None:
    degenerate, reward = logs.now("degenerate_groups"), logs.now("reward")
    if not degenerate >= 0.7 or reward_collapsed(logs):  # whose problems are not to blame
        return None
    accuracy = logs.now("accuracy")
    if accuracy >= 0.8:
        cause = "the problems are too easy now: give harder ones"
    elif math.isnan(accuracy):  # rewards that say nothing of right and wrong
        cause = "a reward that tells answers apart, or other problems, would"
    elif accuracy <= 0.2:
        cause = "the problems are too hard: give easier ones, more siblings, or a stronger model"
    else:
        cause = (
            "a problem is always right or always wrong: give problems between, or, if the entropy has fallen, lower "
            "train.learning_rate"
        )
    flat = "Reward is flat and " if abs(reward - logs.at_first("reward")) < 0.02 else ""
    contrast = logs.config.may_erase and logs.config.objective.options.get("erased") == "contrast"
    what = "nothing but what to erase" if contrast else "nothing"
    sentence = f"{flat}{degenerate:.0%} of the groups teach {what}, since all their rewards are equal; {cause}."
    return Finding("warn", sentence[0].upper() + sentence[1:])


def never_erases(logs: Logs) -> Finding | None:
    if not logs.config.rollout.erase or logs.config.erasure.max_erasures == 0 or sum(logs.values("erase_rate")) > 0:
        return None
    return Finding(
        "warn",
        "Erase rate 0: nothing was ever erased, so this is a plain run. Lower "
        f"erasure.{logs.config.erasure.strictness}{_or_calibrate(logs.config)}.",
    )


def erases_too_much(logs: Logs) -> Finding | None:
    ratio = logs.now("r")
    if not ratio > 0.5:
        return None
    return Finding(
        "warn",
        f"Erased tokens come to {ratio:.0%} of the committed ones, which makes rollouts that much more expensive. Raise "
        f"erasure.{logs.config.erasure.strictness}{_or_calibrate(logs.config)}.",
    )


def _or_calibrate(config: Config) -> str:
    """Calibration chooses kappa_0 alone."""
    return ", or run `e3rl calibrate`" if config.erasure.strictness == "kappa0" else ""


def budget_spent(logs: Logs) -> Finding | None:
    """Only where something may be erased: a judge alone, with no erasures to spend, forces nothing."""
    forced = logs.now("forced_rate")
    if not (logs.config.erasure.max_erasures and forced > 0.2):
        return None
    return Finding(
        "warn",
        f"{forced:.0%} of the segments were accepted only because their erasures were used up: redrawing does not "
        "bring them below the threshold.",
    )


def kl_rising(logs: Logs) -> Finding | None:
    first, now = logs.at_first("kl"), logs.now("kl")
    if not (logs.long_enough() and now > 0.1 and now > 3 * first):
        return None
    return Finding(
        "warn",
        f"KL to the reference policy is rising, from {first:.3f} to {now:.3f}. If held-out accuracy does not rise with "
        "it, lower train.learning_rate or raise objective.kl_coef.",
    )


def entropy_collapsed(logs: Logs) -> Finding | None:
    first, now = logs.at_first("entropy"), logs.now("entropy")
    if not (logs.long_enough() and now < 0.2 * first):
        return None
    return Finding(
        "warn",
        f"Token entropy fell from {first:.3f} to {now:.3f} nats: siblings become similar and groups stop giving gradients.",
    )


def mostly_clipped(logs: Logs) -> Finding | None:
    clipped = logs.now("clip_fraction")
    if not clipped > 0.3:
        return None
    return Finding(
        "warn",
        f"{clipped:.0%} of the ratios are clipped, so most of a batch is thrown away. Lower train.learning_rate, "
        "train.num_iterations or train.minibatches.",
    )


def cut_short(logs: Logs) -> Finding | None:
    finished = logs.now("finish_ratio")
    if not finished < 0.7:
        return None
    return Finding(
        "warn",
        f"Only {finished:.0%} of the responses end by themselves; the rest are cut at "
        f"{logs.config.rollout.completion_limit} tokens. Raise rollout.max_segments or rollout.segment_length.",
    )


def engines_disagree(logs: Logs) -> Finding | None:
    gap, sample = logs.now("mismatch_mean"), logs.now("mismatch_ess")
    if not (gap > 0.05 or sample < 0.9):
        return None
    return Finding(
        "warn",
        f"Rollout engine and trainer give a sampled token log-probabilities {gap:.3f} apart: gradients are off-policy. "
        "Check the dtypes and the sampling truncation.",
    )


def signs_flip(logs: Logs) -> Finding | None:
    """Only of rewards that attention divides: that credit by segment has signs of its own is what it is for."""
    objective = logs.config.objective
    divided = objective.name == "e3rl" and objective.options.get("allocation", "causal") == "causal"
    flipped = logs.now("sign_flips")
    if not (divided and flipped > 0.25):
        return None
    return Finding(
        "note",
        f"{flipped:.0%} of the positions get an advantage of the opposite sign to their response's. "
        "objective.allocation = 'anchored' keeps the sign.",
    )


def waits_for_rewards(logs: Logs) -> Finding | None:
    """Over the last steps without the first, in which a reward's code is loaded."""
    if len(logs.metrics) <= RECENT:
        return None
    parts = [logs.now(f"seconds_{part}") for part in ("rollout", "reward", "train")]
    if not parts[1] > 0.3 * sum(parts):
        return None
    return Finding("note", f"{parts[1] / sum(parts):.0%} of the time goes into rewards. Raise rewards.workers.")


def memory_grows(logs: Logs) -> Finding | None:
    memory = logs.values("memory_mb")
    if not memory or not logs.long_enough():
        return None
    half_way, now = memory[len(memory) // 2], memory[-1]
    if now < 1.2 * half_way:
        return None
    return Finding("note", f"Peak memory still grows: {half_way:.0f} MiB half-way, {now:.0f} MiB now.")


def held_out(logs: Logs) -> Finding | None:
    """Plain decoding, first evaluation against the last: reported as different only if the intervals don't overlap."""
    plain = [r for r in overall(logs.evaluations) if r["mode"] == "plain"]
    if len(plain) < 2:
        return None
    first, last = plain[0], plain[-1]
    k = last["samples"]
    name, before, after = f"Held-out Avg@{k}", first[f"avg@{first['samples']}"], last[f"avg@{k}"]
    if last["ci95"][0] > first["ci95"][1]:
        return Finding("good", f"{name} rose from {before:.3f} to {after:.3f}; the 95 % intervals are apart.")
    if last["ci95"][1] < first["ci95"][0]:
        return Finding("bad", f"{name} fell from {before:.3f} to {after:.3f}; the 95 % intervals are apart.")
    change = f"{name} went from {before:.3f} to {after:.3f}"
    return Finding("note", f"{change}; the 95 % intervals overlap, so that may be chance.")


RULES: tuple[Rule, ...] = (
    not_finite,
    reward_collapsed,
    rewards_missing,
    rewards_restart,
    no_signal,
    never_erases,
    erases_too_much,
    budget_spent,
    kl_rising,
    entropy_collapsed,
    mostly_clipped,
    cut_short,
    engines_disagree,
    held_out,
    signs_flip,
    waits_for_rewards,
    memory_grows,
)
_ORDER = ("bad", "warn", "good", "note")


def examine(logs: Logs) -> list[Finding]:
    """The findings of all rules, most serious first."""
    if not logs.metrics:
        return [Finding("note", "No step is done yet.")]
    found = [finding for rule in RULES if (finding := rule(logs)) is not None]
    if not any(f.level in ("bad", "warn") for f in found):
        found.append(Finding("good", "Nothing looks wrong."))
    return sorted(found, key=lambda f: _ORDER.index(f.level))


def _steps(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:3])
    return f"step {shown}" if len(numbers) == 1 else f"steps {shown}" + (" and later" if len(numbers) > 3 else "")
