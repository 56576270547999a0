"""Draws the figures of docs/concepts.md from the same traced step as tools/trace_row.py and from the equations themselves.

python tools/concept_figures.py              rewrite docs/img/concepts-*.svg  (needs matplotlib)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from traced_step import Trace, trace

from e3rl.cli.opening import quiet_libraries
from e3rl.config import ErasureConfig
from e3rl.equations.threshold import attempt_penalty, modulation
from e3rl.types import Candidate, Judgement

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "img"
KEPT, ERASED, MUTED = "#0072b2", "#d55e00", "#7f7f7f"
matplotlib.rcParams |= {
    "svg.hashsalt": "e3rl", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def judged(candidate: Any) -> Judgement:
    assert candidate.judgement is not None
    return candidate.judgement  # type: ignore[no-any-return]


def erasure_figure(t: Trace) -> Figure:
    """What was erased beside what replaced it, token by token, and both among the siblings."""
    trajectory = t.group.trajectories[t.star]
    erased = trajectory.erasures[0]
    kept = trajectory.segments[erased.index]
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    tokens, verdicts = figure.subplots(1, 2, width_ratios=[3, 2])
    pair: Sequence[tuple[str, Candidate, str, float]] = [
        ("erased", erased.candidate, ERASED, -0.2), ("kept", kept.candidate, KEPT, 0.2),
    ]  # fmt: skip
    for name, candidate, colour, shift in pair:
        at = [i + shift for i in range(len(candidate.ids))]
        tokens.bar(at, candidate.perturbations, width=0.38, color=colour, label=f"{name}: {t.text(candidate.ids)}")
    longest = max(len(erased.candidate.ids), len(kept.candidate.ids))
    tokens.set(
        xticks=range(longest), xticklabels=[_both(t, erased.candidate, kept.candidate, i) for i in range(longest)]
    )
    tokens.set(xlabel="token (erased over kept where they differ)", ylabel="perturbation ε, nats")
    tokens.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    rows = [(f"sibling {x.sibling}", judged(x.segments[erased.index])) for x in t.group.trajectories
            if x.sibling != t.star and len(x.segments) > erased.index]  # fmt: skip
    rows += [(f"sibling {t.star}, erased", judged(erased)), (f"sibling {t.star}, drawn again", judged(kept))]
    for y, (_, j) in enumerate(rows):
        verdicts.barh(y, j.uncertainty.total, color=ERASED if j.uncertainty.total > j.threshold.total else KEPT)
        verdicts.plot([j.threshold.total] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.6)
    verdicts.invert_yaxis()
    verdicts.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows], xlabel="U; the threshold Θ as a line")
    return figure


def _both(t: Trace, erased: Candidate, kept: Candidate, i: int) -> str:
    texts = [t.text(c.ids[i : i + 1]) or "end" if i < len(c.ids) else "" for c in (erased, kept)]
    return texts[0] if texts[0] == texts[1] else "\n".join(texts)


def threshold_figure(t: Trace) -> Figure:
    """The factors of the threshold that the baseline is multiplied by: Γ and φ, at the default settings."""
    del t
    settings = ErasureConfig()
    figure = Figure(figsize=(8.2, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    attempts = range(settings.max_erasures + 1)
    penalties = [float(attempt_penalty(e, settings.eta, settings.delta)) for e in attempts]
    left.plot(attempts, penalties, "o-", color=KEPT)
    left.set(xlabel="erasures of this segment so far", ylabel="Γ: the threshold rises", xticks=attempts)
    above = [i / 50 - 1 for i in range(151)]
    one = torch.ones(1)
    factors = [float(modulation(one * (1 + x), one, settings.rho)) for x in above]
    right.plot(above, factors, color=KEPT)
    right.axvline(0, color=MUTED, linewidth=0.8, linestyle="dashed")
    right.set(xlabel="how far the earlier segments were above their baseline", ylabel="φ: the threshold follows")
    return figure


def shares_figure(t: Trace) -> Figure:
    """How the attention of a response's end divides the reward among its segments."""
    kept = [x for x in t.lessons if not x.sequence.erased]
    figure = Figure(figsize=(8.2, 2.4), layout="constrained")
    axes = figure.subplots()
    for y, lesson in enumerate(kept):
        reward = t.rewarded.rewards[lesson.sequence.sibling].value
        shares_T = lesson.scores.shares_T
        assert shares_T is not None
        left = 0.0
        for n in range(int(lesson.sequence.segments_T.max()) + 1):
            share = float(shares_T[lesson.sequence.segments_T == n].sum())
            axes.barh(
                y, share, left=left, color=KEPT if reward else MUTED, alpha=0.35 + 0.13 * (n % 5), edgecolor="white"
            )
            if share > 0.03:
                axes.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
            left += share
    names = [f"sibling {x.sequence.sibling}, reward {t.rewarded.rewards[x.sequence.sibling].value:g}" for x in kept]
    axes.invert_yaxis()
    axes.set(yticks=range(len(kept)), yticklabels=names, xlabel="share of the final attention, segment by segment")
    return figure


FIGURES: dict[str, Callable[[Trace], Figure]] = {
    "erasure": erasure_figure,
    "shares": shares_figure,
    "threshold": threshold_figure,
}


def main(directory: Path = IMAGES) -> list[Path]:
    """Write all figures and return their paths."""
    quiet_libraries()
    found = trace()
    paths = [directory / f"concepts-{name}.svg" for name in FIGURES]
    for path, draw in zip(paths, FIGURES.values(), strict=True):
        draw(found).savefig(path, metadata={"Date": None}, facecolor="white")
    return paths


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
