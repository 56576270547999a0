"""Findings of a diagnosis as plain sentences. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from e3rl.diagnose.diagnosis import EVERYWHERE, Diagnosis, RetryGain, Signal
from e3rl.diagnose.statistics import Estimate, erasing_yield, highest_success
from e3rl.report.health import Finding


def _above(estimate: Estimate, line: float) -> bool:
    return estimate.low is not None and estimate.low > line


def _points(estimate: Estimate) -> str:
    """A difference of accuracies in points, with its interval."""
    assert estimate.value is not None
    text = f"{100 * estimate.value:+.1f} points"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _share(estimate: Estimate) -> str:
    assert estimate.value is not None
    bounds = "" if estimate.low is None or estimate.high is None else f" ({estimate.low:.2f}–{estimate.high:.2f})"
    return f"{estimate.value:.2f}{bounds}"


_WORTH_USING = 0.7
"""Smallest useful AUROC. An interval that ends below it is too little; one that reaches from chance to it is undecided."""


def _faint(estimate: Estimate) -> bool:
    """Clearly above chance, and clearly too little to act on."""
    return _above(estimate, 0.5) and estimate.high is not None and estimate.high < _WORTH_USING


def _named(diagnosis: Diagnosis, name: str) -> Signal:
    return next(s for s in diagnosis.signals if s.name == name)


def on_uncertainty(diagnosis: Diagnosis) -> Finding:
    """Does the paper's U detect mistakes, overall and among siblings?"""
    u = _named(diagnosis, "U, paper")
    if u.within.value is None:
        return Finding("note", "No prefix had a right and a wrong draw, so single draws can't be compared.")
    seen = f"AUROC {_share(u.overall)} over all segments" if u.overall.value is not None else "no segment is wrong"
    if _faint(u.within):
        return Finding("warn", f"The paper's U hardly tells a bad draw from its siblings: {_share(u.within)} ({seen}).")
    if _above(u.within, 0.5):
        return Finding("good", f"The paper's U tells a bad draw from its siblings: {_share(u.within)} ({seen}).")
    if u.within.high is not None and u.within.high < 0.5:
        return Finding(
            "warn",
            f"The paper's U points the wrong way among siblings: {_share(u.within)}, 0.5 is chance ({seen}). Erasing by it "
            "drops the better draws.",
        )
    return Finding(
        "warn",
        f"The paper's U can't tell a bad draw from its siblings: {_share(u.within)}, 0.5 is chance ({seen}). It detects "
        "hard prefixes, and a retry starts from the same one.",
    )


def on_best_signal(diagnosis: Diagnosis) -> Finding | None:
    """The signal that separates siblings best."""
    usable = [s for s in diagnosis.signals if s.within.value is not None]
    if not usable:
        return None
    best = max(usable, key=lambda s: s.within.value or 0.0)
    if not _above(best.within, 0.5):
        return Finding("warn", "No signal tells a bad draw from its siblings with any certainty.")
    late = " It is known one segment late." if best.late else ""
    return Finding("note", f"What tells siblings apart best is {best.name}: {_share(best.within)}.{late}")


def on_late_evidence(diagnosis: Diagnosis) -> Finding | None:
    """Do mistakes show in what follows them?"""
    entropy = diagnosis.responses[0].within
    if entropy.value is None:
        return None
    if _faint(entropy):
        return Finding(
            "note",
            f"Mistakes hardly show in what follows them: among answers to one problem, the whole response's entropy tells wrong "
            f"from right with {_share(entropy)}, 0.5 is chance. That is too little to draw again by.",
        )
    if _above(entropy, 0.5):
        return Finding(
            "note",
            f"Mistakes show in what follows them: among answers to one problem, the whole response's entropy tells wrong from "
            f"right ({_share(entropy)}). Judge long segments, by entropy and a little ε: evidence that no lower temperature has.",
        )
    if entropy.high is None or entropy.high > _WORTH_USING:
        return Finding(
            "note",
            f"Whether mistakes show in what follows them can't be said from so few problems: among answers to one problem, the "
            f"whole response's entropy tells wrong from right with {_share(entropy)}, 0.5 is chance. Give it more (--problems).",
        )
    return Finding(
        "note",
        f"Mistakes are silent: among answers to one problem, the whole response's entropy does not tell wrong from right "
        f"({_share(entropy)}). Only the draw itself (ε) shows them, and a lower temperature avoids the same draws.",
    )


def on_retries(diagnosis: Diagnosis) -> Finding | None:
    """Is drawing the most suspicious quarter again worth it?"""
    known = [(g.signal, g.gains[-1]) for g in diagnosis.gains if g.gains[-1].value is not None]
    if not known:
        return None
    name, best = max(known, key=lambda item: item[1].value or 0.0)
    sentence = (
        f"Drawing the quarter of segments with the largest '{name}' again changes their accuracy by {_points(best)}."
    )
    return Finding("good" if _above(best, 0.0) else "warn", f"{sentence} {_worth_its_tokens(diagnosis.gains)}")


def _worth_its_tokens(gains: Sequence[RetryGain]) -> str:
    """Where one retry surely gives more right answers than its tokens give plainly."""
    surely = [(g.signal, g.above) for g in gains if g.above is not None]
    if not surely:
        return "Nowhere is a retry shown to be worth its tokens: without that, plain decoding is never worse per token."
    name, above = surely[0]
    where = "everywhere" if above == EVERYWHERE else f"where '{name}' is above {above:.3g}"
    return f"One retry is worth its tokens {where}: it gives more right answers than plain decoding with as many (95 % sure)."


_WORTH_HAVING = 0.05
"""Smallest useful gain in Avg@k. An interval around 0 that reaches beyond it is undecided."""


def on_decoding(diagnosis: Diagnosis) -> Finding:
    """Does erasing beat plain decoding at its best temperature?"""
    fight = diagnosis.contest
    plain, erasable = _either(fight.plain), _either(fight.erasable)
    cost = f"{fight.tokens - 1:+.0%} tokens"
    if _above(fight.avg, 0.0):
        return Finding(
            "good",
            f"Decode with {erasable}: {_points(fight.avg)} over {plain} on held-back problems (Pass@{diagnosis.samples} "
            f"{_points(fight.passed)}), {cost}."
            f"{_reranking(diagnosis)}",
        )
    if _above(fight.passed, 0.0):
        return Finding(
            "good",
            f"Where you take several samples, decode with {erasable}: one of them is right more often, {_points(fight.passed)} "
            f"over {plain}, at equal average accuracy and {cost}.",
        )
    changes = (
        f"the best erasable setting ({erasable}) changes Avg@{diagnosis.samples} by {_points(fight.avg)} and "
        f"Pass@{diagnosis.samples} by {_points(fight.passed)} at {cost}."
    )
    loses_pass = fight.passed.high is not None and fight.passed.high < 0
    if fight.avg.high is not None and fight.avg.high > _WORTH_HAVING and not loses_pass:
        return Finding(
            "note",
            f"Whether erasing beats {plain} can't be said from so few problems: {changes} Give it more (--problems), and decode "
            "plainly until then.",
        )
    return Finding("warn", f"Decode plainly ({plain}): {changes}")


def on_settings(diagnosis: Diagnosis) -> Finding | None:
    """The settings of the recommended decoding, to copy; if two are recommended, those of the more accurate."""
    if on_decoding(diagnosis).level != "good":
        return None
    here = [d for d in diagnosis.decodings if d.name in diagnosis.contest.erasable]
    best = max(here, key=lambda d: d.avg.value or 0.0)
    settings = f" and: {' '.join(best.overrides)}" if best.overrides else ""  # no full stop: it would be copied too
    return Finding("note", f"To decode this way: e3rl eval, decode or serve with this diagnosis's recipe{settings}")


def _reranking(diagnosis: Diagnosis) -> str:
    """The same evidence without erasing, where it was measured."""
    reranked = [d.avg.value for d in diagnosis.decodings if d.kind == "rerank" and d.avg.value is not None]
    if not reranked:
        return ""
    return f" Drawing twice as many and keeping the calmer half is right {max(reranked):.2f} of the time."


def _either(names: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(names))


def on_training(diagnosis: Diagnosis) -> Finding:
    """Can a group-normalised objective learn here at all?"""
    mixed = diagnosis.mixed_groups
    if mixed >= 0.3:
        return Finding(
            "note", f"{mixed:.0%} of the groups hold right and wrong answers: reinforcement learning has a signal."
        )
    if (diagnosis.accuracy.value or 0.0) > 0.5:
        return Finding(
            "warn", f"Only {mixed:.0%} of the groups hold right and wrong answers: these problems are too easy."
        )
    return Finding(
        "warn",
        f"Only {mixed:.0%} of the groups hold right and wrong answers: most rollouts would teach nothing. Take easier "
        "problems, more samples of each, or a stronger model.",
    )


_GOOD_JUDGE = 0.95
"""AUROC among draws from one prefix that no signal here has: what it can't do, none can."""


def on_erasing_in_training(diagnosis: Diagnosis) -> Finding:
    """Is the success rate low enough for rollouts that erase to teach more per token than plain ones?"""
    success, parts = diagnosis.accuracy.value or 0.0, diagnosis.segments
    measured = [s.within.value for s in diagnosis.signals if not s.late and s.within.value is not None]
    auroc = max(measured, default=_GOOD_JUDGE)
    ratio, limit = erasing_yield(success, parts, auroc).ratio, highest_success(parts, auroc)
    best = max(erasing_yield(success, parts, a).ratio for a in (auroc, _GOOD_JUDGE))
    found = (
        f"Training: at a success rate of {success:.2f} with {parts:.1f} segments a response, a token of rollouts that erase "
        f"teaches at most {ratio:.2f} times what a plain one does, if judged with AUROC {auroc:.2f}"
    )
    if ratio > 1:
        return Finding(
            "note",
            f"{found}: erasing in training could pay (below {limit:.2f}). That is a bound and no promise, and in the lab a good "
            "judge was worth more as a reward for each step.",
        )
    if best > 1:
        return Finding("note", f"{found}: train plainly. A judge of {_GOOD_JUDGE:.2f} could do {best:.2f} times.")
    where = f"it could below {limit:.2f}" if limit else "at no success rate could it"
    return Finding("note", f"{found}: erasing in training doesn't pay, train plainly ({where}).")


def advise(diagnosis: Diagnosis) -> list[Finding]:
    """All findings, the decisive one first."""
    found = [
        on_decoding(diagnosis),
        on_settings(diagnosis),
        on_uncertainty(diagnosis),
        on_best_signal(diagnosis),
        on_late_evidence(diagnosis),
        on_retries(diagnosis),
        on_training(diagnosis),
        on_erasing_in_training(diagnosis),
    ]
    return [finding for finding in found if finding is not None]
