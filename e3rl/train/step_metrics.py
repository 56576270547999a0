"""One line of metrics.jsonl from what a step did. Pure: values in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from e3rl.objectives.metrics import sign_flips
from e3rl.rollout.stats import summarise
from e3rl.train.collect import StepGroups
from e3rl.train.lessons import Lesson
from e3rl.train.metrics import Update, by_index, mean, spread
from e3rl.types import Reward, RewardedGroup, Segment


def reward_metrics(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """Reward, accuracy, and the share of groups with a learning signal."""
    rewards = [r for item in rewarded for r in item.rewards]
    known = [r.value for r in rewards if r.value is not None]
    asked = [item.rewards for item in rewarded if item.group.policy_version is not None]
    by_group = [{r.value for r in group if r.value is not None} for group in asked]
    return {
        "reward": mean(known),
        "reward_std": spread(known),
        **function_metrics(rewards),
        "accuracy": mean(r.right for r in rewards if r.right is not None),
        "reward_missing": sum(r.value is None for group in asked for r in group),
        "degenerate_groups": mean(len(values) < 2 for values in by_group),
    }


def function_metrics(rewards: Sequence[Reward]) -> dict[str, float]:
    """Each reward function's own values."""
    names = dict.fromkeys(name for r in rewards for name in r.parts)
    found: dict[str, float] = {}
    for name in names:
        values = [v for r in rewards if (v := r.parts.get(name)) is not None]
        found |= {f"rewards/{name}/mean": mean(values), f"rewards/{name}/std": spread(values)}
    return found


def segment_metrics(rewarded: Sequence[RewardedGroup], lessons: Sequence[Lesson]) -> dict[str, list[float]]:
    """The series by segment index (the paper's figure 6)."""
    trajectories = [t for item in rewarded for t in item.group.trajectories]
    drawn: list[tuple[int, Segment]] = [pair for t in trajectories for pair in enumerate(t.drawn_segments)]
    judged = [(n, s.judgement) for n, s in drawn if s.judgement is not None]
    advantages = [
        (int(n), float(lesson.advantages_T[lesson.sequence.segments_T == n].mean()))
        for lesson in lessons
        if not lesson.sequence.erased
        for n in lesson.sequence.segments_T[lesson.sequence.mask_T].unique()
    ]
    return {
        "acceptance": by_index((n, j.attempt == 0 and j.verdict == "commit") for n, j in judged),
        "uncertainty": by_index((n, j.uncertainty.total) for n, j in judged),
        "threshold": by_index((n, j.threshold.total) for n, j in judged),
        "baseline": by_index((n, j.threshold.baseline) for n, j in judged),
        "penalty": by_index((n, j.threshold.penalty) for n, j in judged),
        "modulation": by_index((n, j.threshold.modulation) for n, j in judged),
        "advantage": by_index(advantages),
    }


def order_metrics(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """How well U at the time of judging tells which of two siblings ends with the lower reward; absent without such pairs."""
    won = pairs = 0.0
    for item in rewarded:
        found: dict[int, list[tuple[float, float]]] = {}
        for trajectory, reward in zip(item.group.trajectories, item.rewards, strict=True):
            for index, segment in enumerate(trajectory.drawn_segments):
                if segment.judgement is not None and reward.value is not None:
                    found.setdefault(index, []).append((segment.judgement.uncertainty.total, reward.value))
        for here in found.values():
            u_G, reward_G = torch.tensor(here, dtype=torch.float64).unbind(1)
            worse_GG = reward_G[:, None] < reward_G
            above_GG = (u_G[:, None] > u_G) + 0.5 * (u_G[:, None] == u_G)
            won, pairs = won + float(above_GG[worse_GG].sum()), pairs + float(worse_GG.sum())
    return {"uncertainty_auroc": won / pairs} if pairs else {}


def rollout_metrics(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """Lengths, erasures and entropies of the step's trajectories."""
    groups = [item.group for item in rewarded]
    trajectories = [t for g in groups for t in g.trajectories]
    stats = summarise(groups)
    drawn = summarise(g for g in groups if g.policy_version is not None)
    candidates = [s.candidate for t in trajectories for s in t.drawn_segments]
    return {
        "finish_ratio": mean(t.finish == "stop" for t in trajectories),
        "length": mean(t.committed_tokens for t in trajectories),
        "length_min": min((t.committed_tokens for t in trajectories), default=math.nan),
        "length_max": max((t.committed_tokens for t in trajectories), default=math.nan),
        "length_finished": mean(t.committed_tokens for t in trajectories if t.finish == "stop"),
        "segments": mean(len(t.drawn_segments) for t in trajectories),
        "candidates": stats.candidates,
        "erasures": stats.erasures,
        "committed_tokens": stats.committed_tokens,
        "erased_tokens": stats.erased_tokens,
        "erase_rate": stats.erase_rate,
        "r": stats.r,
        "forced_rate": stats.forced_rate,
        "entropy": mean(h for c in candidates for h in c.entropies.tolist()),
        "kept_mass": mean(m for c in candidates for m in c.kept_mass.tolist()),
        "tokens": drawn.generated_tokens,
    }


def turn_metrics(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """Turns and tool calls, where the step's responses have some."""
    trajectories = [t for item in rewarded for t in item.group.trajectories]
    if all(t.prompt.tools is None for t in trajectories):
        return {}
    kept = [s.observation for t in trajectories for s in t.segments if s.observation is not None]
    erased = [e.observation for t in trajectories for e in t.erasures if e.observation is not None]
    calls = [call for observation in (*kept, *erased) for call in observation.calls]
    return {
        "turns": mean(t.turns for t in trajectories),
        "calls": sum(len(observation.calls) for observation in kept) / len(trajectories),
        "call_errors": mean(call.failed for call in calls),
        "erased_turns": len(erased),
        "seconds_tools": sum(observation.seconds for observation in (*kept, *erased)),
        "environment_failures": sum(t.failure is not None for t in trajectories),
    }


def filter_metrics(groups: StepGroups) -> dict[str, float]:
    """What the filter kept and dropped."""
    return {
        "groups_kept": len(groups.kept),
        "refills": groups.refills,
        "dropped_tokens": groups.dropped_tokens,
    }


def importance_metrics(lessons: Sequence[Lesson]) -> dict[str, float]:
    """The importance weights of the step's tokens, where there are any."""
    found = [(lesson.importance, lesson.sequence.mask_T) for lesson in lessons if lesson.importance is not None]
    if not found:
        return {}
    return {
        "importance_weight": float(torch.cat([importance.weights_T[mask_T] for importance, mask_T in found]).mean()),
        "importance_limited": float(
            torch.cat([importance.limited_T[mask_T] for importance, mask_T in found]).float().mean()
        ),
    }


def lesson_metrics(lessons: Sequence[Lesson]) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, and how often an advantage's sign is flipped."""
    kept = [lesson for lesson in lessons if not lesson.sequence.erased]
    if not kept:
        return {}
    gaps = [(x.scores.logprobs_T - x.sequence.rollout_logprobs_T)[x.sequence.mask_T] for x in kept]
    weights_S = torch.stack([gap.sum() for gap in gaps]).double()
    weights_S = (weights_S - weights_S.max()).exp()
    flat = torch.cat(gaps).abs()
    return {
        "mismatch_mean": float(flat.mean()),
        "mismatch_max": float(flat.max()),
        "mismatch_ess": float(weights_S.sum() ** 2 / (weights_S**2).sum() / len(weights_S)),
    }


def sign_flip_share(lessons: Sequence[Lesson], rewarded: Sequence[RewardedGroup]) -> float:
    """Share of the step's positions whose advantage has the sign opposite to the sequence advantage."""
    flipped = positions = 0.0
    for index, item in enumerate(rewarded):
        kept = [x for x in lessons if x.sequence.group == index and not x.sequence.erased]
        if not kept:
            continue
        advantages_GT = torch.nn.utils.rnn.pad_sequence([x.advantages_T for x in kept], batch_first=True)
        mask_GT = torch.nn.utils.rnn.pad_sequence([x.sequence.mask_T for x in kept], batch_first=True)
        rewards_G = torch.tensor([float(item.rewards[x.sequence.sibling].value or 0.0) for x in kept])
        total, count = sign_flips(advantages_GT, rewards_G, mask_GT)
        flipped, positions = flipped + total, positions + count
    return flipped / positions if positions else math.nan


def step_record(
    step: int,
    groups: StepGroups,
    lessons: Sequence[Lesson],
    update: Update,
    *,
    version: int,
    train_seconds: float,
    tokens_before: int,
    reward_restarts: int,
) -> dict[str, Any]:
    """A line of metrics.jsonl; its keys are explained in `e3rl.train.metrics.METRICS`.

    ``version``: optimizer updates before the step. Rewards and rollouts are those of all groups, also of those that the
    filter dropped.
    """
    made = rollout_metrics(groups.all)
    seconds = groups.rollout_seconds + groups.reward_seconds + train_seconds
    return {
        "step": step,
        "epoch": groups.epochs,
        **reward_metrics(groups.all),
        **filter_metrics(groups),
        **made,
        **turn_metrics(groups.all),
        **segment_metrics(groups.all, lessons),
        **order_metrics(groups.all),
        **lesson_metrics(lessons),
        **importance_metrics(lessons),
        "sign_flips": sign_flip_share(lessons, groups.all),
        **update.means,
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "tokens_total": tokens_before + made["tokens"],
        "tokens_per_second": made["tokens"] / seconds if seconds else math.nan,
        "seconds_rollout": groups.rollout_seconds,
        "seconds_reward": groups.reward_seconds,
        "seconds_train": train_seconds,
        "memory_mb": peak_memory_mb(),
        "reward_restarts": reward_restarts,
        "skipped": int(math.isnan(update.grad_norm)),
        **staleness(groups.all, version),
    }


def sampled_text(item: RewardedGroup, tokenizer: Any, longest: int = 600) -> str:
    """The first completion of a group as a few lines, for a person: its prompt's end, itself, its reward."""

    def cut(text: str, end: bool) -> str:
        return text if len(text) <= longest else "…" + text[-longest:] if end else text[:longest] + "…"

    trajectory, reward = item.group.trajectories[0], item.rewards[0]
    prompt = tokenizer.decode(list(trajectory.prompt.ids), skip_special_tokens=True)
    text = tokenizer.decode(trajectory.ids.tolist(), skip_special_tokens=True)
    value = "missing" if reward.value is None else f"{reward.value:.3g}"
    ended = "" if trajectory.finish == "stop" else ", cut off at the length limit"
    count = len(trajectory.erasures)
    erased = f", {count} segment{'' if count == 1 else 's'} erased" if count else ""
    return f"sample: {cut(prompt, True)}\n      → {cut(text, False)}\n        reward {value}{ended}{erased}"


def staleness(rewarded: Sequence[RewardedGroup], version: int) -> dict[str, float]:
    """Optimizer updates between the weights that drew the candidates and those that learn from them: mean and most."""
    trajectories = [t for item in rewarded for t in item.group.trajectories]
    candidates = [s.candidate for t in trajectories for s in t.segments]
    candidates += [e.candidate for t in trajectories for e in t.erasures]
    found = [version - c.version for c in candidates if c.version is not None]
    return {"staleness": mean(found), "staleness_most": max(found, default=math.nan)}


def peak_memory_mb() -> float:
    """Peak memory of the GPU where there is one, else of this process, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
