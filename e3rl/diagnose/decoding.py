"""Accuracy against tokens: plain decoding over temperatures, majority vote, and erasable decoding over settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from e3rl.config import Config, RolloutConfig, to_tables
from e3rl.diagnose.sampling import Tell
from e3rl.diagnose.signals import LATE_EPS_WEIGHT, LENGTH_EXPONENT, late_suspicion
from e3rl.diagnose.statistics import Estimate, mean_by_problem
from e3rl.engine.protocol import Engine
from e3rl.evaluate.evaluation import Evaluation, evaluate
from e3rl.evaluate.metrics import avg_at_k, pass_at_k_by_problem
from e3rl.rewards.answers import extract_answer
from e3rl.rewards.scorer import Scorer
from e3rl.types import Prompt

Kind = Literal["plain", "majority", "rerank", "erasable"]

TEMPERATURES = (1.0, 0.6, 0.3)
_WEIGHTS = ("base_weight", "gradient_weight", "extremum_weight", "perturbation_weight")


@dataclass(frozen=True)
class ErasureSetting:
    """A way to erase: weights of U's terms, and kappa_0 or a quantile of the first candidates. ``segments``: number of segments
    of a response, None: as configured. ``hot``: entropy and ε at temperature 1, whatever the sampling temperature.
    ``length_exponent``: above 0, longer segments are more suspicious."""

    title: str
    weights: tuple[float, float, float, float]
    kappa0: float | None = None
    quantile: float | None = None
    segments: int | None = None
    hot: bool = False
    length_exponent: float = 0.0

    def applied(self, config: Config) -> Config:
        """The config with this setting; whole responses and halves use no other segments."""
        config = measured_hot(config) if self.hot else config
        changed: dict[str, Any] = dict(zip(_WEIGHTS, self.weights, strict=True))
        changed["length_exponent"] = self.length_exponent
        if self.kappa0 is not None:
            changed |= {"baseline": "group", "kappa0": self.kappa0}
        if self.quantile is not None:
            changed |= {"baseline": "quantile", "quantile": self.quantile}
        if self.segments is None:
            return replace(config, erasure=replace(config.erasure, **changed))
        alone: dict[str, Any] = {"smoothing_window": 0, "rho": 0.0}
        return replace(
            config,
            erasure=replace(config.erasure, **changed, **alone),
            rollout=_cut_into(config.rollout, self.segments),
        )


def _cut_into(rollout: RolloutConfig, segments: int) -> RolloutConfig:
    """The config with this many segments of equal length; the last is shorter if they don't divide a response evenly."""
    limit = rollout.completion_limit
    length = -(-limit // segments)
    longest = limit if length * segments > limit else rollout.max_completion_length
    return replace(rollout, segment_length=length, max_segments=segments, max_completion_length=longest)


def measured_hot(config: Config) -> Config:
    """The config with entropy and ε at temperature 1: a low temperature hides the uncertainty that they measure."""
    return replace(config, erasure=replace(config.erasure, entropy_temperature=1.0, entropy_distribution="full"))


_PAPER = (1.0, 0.5, 0.1, 0.0)
_ENTROPY = (1.0, 0.0, 0.0, 0.0)
_EPS = (0.0, 0.0, 0.0, 1.0)
_BOTH = (1.0, 0.0, 0.0, LATE_EPS_WEIGHT)
LATE, LATE_EPS, LATE_EPS_LENGTH, HALF_EPS = "whole", "whole+eps", "whole+eps+length", "half+eps"
SETTINGS: Mapping[str, ErasureSetting] = {
    "paper-1": ErasureSetting("U, paper, κ₀ = 1", _PAPER, 1.0),
    "paper-2": ErasureSetting("U, paper, κ₀ = 2", _PAPER, 2.0),
    "paper+eps": ErasureSetting("U + ε, κ₀ = 1", (1.0, 0.5, 0.1, 1.0), 1.0),
    "eps-0.5": ErasureSetting("ε, κ₀ = 0.5", _EPS, 0.5),
    "eps-1": ErasureSetting("ε, κ₀ = 1", _EPS, 1.0),
    "whole-mild": ErasureSetting("entropy of the whole response, κ₀ = 0.5", _ENTROPY, 0.5, segments=1),
    LATE: ErasureSetting("entropy of the whole response, κ₀ = −0.5", _ENTROPY, -0.5, segments=1),
    LATE_EPS: ErasureSetting(
        "entropy + 0.3 ε of the whole response, the calmest fifth stays",
        _BOTH,
        quantile=0.2,
        segments=1,
        hot=True,
    ),
    LATE_EPS_LENGTH: ErasureSetting(
        "entropy + 0.3 ε of the whole response, times √length, the calmest fifth stays",
        _BOTH,
        quantile=0.2,
        segments=1,
        hot=True,
        length_exponent=LENGTH_EXPONENT,
    ),
    HALF_EPS: ErasureSetting(
        "entropy + 0.3 ε of each half, the calmest fifth stays", _BOTH, quantile=0.2, segments=2, hot=True
    ),
}
"""Erasure settings that are compared, beside the model's own. The late ones include what follows a mistake."""


@dataclass(frozen=True)
class Decoding:
    """One way to decode, measured. ``tokens``: generated for one answer, erased ones and all votes included. ``overrides``: what
    makes the diagnosed config decode so, as settings of a command."""

    name: str
    kind: Kind
    temperature: float
    tokens: float
    avg: Estimate
    passed: Estimate | None  # None for votes and reranking, which leave fewer answers
    correct_P: tuple[float, ...]
    passed_P: tuple[float, ...]
    overrides: tuple[str, ...] = ()


def overrides(config: Config, way: Config, temperature: float) -> tuple[str, ...]:
    """The settings in which ``way`` differs from ``config``, and the temperature where it does."""
    rollout, sampling = replace(way.rollout, temperature=temperature), replace(way.eval, temperature=temperature)
    before, after = to_tables(config), to_tables(replace(way, rollout=rollout, eval=sampling))
    return tuple(
        f"{section}.{key}={value}"
        for section, table in after.items()
        for key, value in table.items()
        if value != before[section][key]
    )


def _of(name: str, kind: Kind, temperature: float, tokens: float, correct_PK: np.ndarray) -> Decoding:
    problems = np.arange(len(correct_PK))
    avg_P = avg_at_k(correct_PK)
    pass_P = pass_at_k_by_problem(correct_PK, correct_PK.shape[1])
    return Decoding(
        name,
        kind,
        temperature,
        tokens,
        mean_by_problem(avg_P, problems),
        mean_by_problem(pass_P, problems) if kind in ("plain", "erasable") else None,
        tuple(avg_P),
        tuple(pass_P),
    )


def majority(answers_PK: Sequence[Sequence[str]], correct_PK: np.ndarray) -> np.ndarray:
    """Whether the commonest answer of each problem is right, [P, 1]; the earliest of equally common ones."""
    chosen = [row.index(Counter(row).most_common(1)[0][0]) for row in map(list, answers_PK)]
    return np.array([[correct_PK[p, k]] for p, k in enumerate(chosen)])


def _votes(evaluation: Evaluation, tokenizer: Any, temperature: float, tokens: float) -> Iterator[Decoding]:
    """Majority votes of the first 4 samples and of all samples of a plain evaluation; none of 2 or fewer."""
    samples = evaluation.correct_PK.shape[1]
    texts_PK = [
        [tokenizer.decode(t.ids.tolist(), skip_special_tokens=True) for t in row] for row in evaluation.trajectories_PK
    ]
    answers_PK = [[extract_answer(text) or text.strip() for text in row] for row in texts_PK]
    for votes in sorted({min(4, samples), samples}):
        if votes > 2:
            right = majority([row[:votes] for row in answers_PK], evaluation.correct_PK)
            yield _of(f"majority of {votes}, T = {temperature:g}", "majority", temperature, votes * tokens, right)


def calmest_half(suspicion_PK: np.ndarray, correct_PK: np.ndarray) -> np.ndarray:
    """Whether the least suspicious half of each problem's samples is right, [P, K/2]: the evidence of late erasing,
    used without erasing."""
    kept = max(1, suspicion_PK.shape[1] // 2)
    order_PK = suspicion_PK.argsort(axis=1, kind="stable")[:, :kept]
    return np.take_along_axis(correct_PK, order_PK, axis=1)


def _reranked(evaluation: Evaluation, temperature: float, tokens: float, length_exponent: float) -> Decoding:
    suspicion_PK = np.array([[late_suspicion(t, length_exponent) for t in row] for row in evaluation.trajectories_PK])
    kept = calmest_half(suspicion_PK, evaluation.correct_PK)
    name = "calmer half of the samples" + (", by length" if length_exponent else "")
    return _of(f"{name}, T = {temperature:g}", "rerank", temperature, 2 * tokens, kept)


def compare(
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    tokenizer: Any,
    config: Config,
    *,
    temperatures: Sequence[float],
    settings: Sequence[str],
    own: bool,
    tell: Tell = lambda activity, done, of: None,
) -> list[Decoding]:
    """Every way to decode on the same problems: plainly at each temperature, with erasure at the highest in each of the named
    `SETTINGS`, and in the most accurate of these at the others. ``own``: the config's own settings are one of them.
    """

    def measured(name: str, kind: Kind, temperature: float, way: Config) -> tuple[Decoding, Evaluation]:
        sampling = replace(way.eval, temperature=temperature, top_p=way.rollout.top_p, top_k=way.rollout.top_k)
        settings = replace(way, eval=sampling)
        tell(f"decoding: {name}, T = {temperature:g}", 0, 0)
        result = evaluate(
            engine, prompts, scorer, tokenizer, settings, erase=kind == "erasable", keep_trajectories=True
        )
        tokens = result.record()["tokens"] / result.correct_PK.size
        decoding = _of(f"{name}, T = {temperature:g}", kind, temperature, tokens, result.correct_PK)
        return replace(decoding, overrides=overrides(config, way, temperature)), result

    found: list[Decoding] = []
    exponents = sorted({0.0} | {SETTINGS[key].length_exponent for key in settings})
    for temperature in temperatures:
        decoding, evaluation = measured("plain", "plain", temperature, measured_hot(config))
        reranked = [_reranked(evaluation, temperature, decoding.tokens, exponent) for exponent in exponents]
        found += [decoding, *reranked, *_votes(evaluation, tokenizer, temperature, decoding.tokens)]
    chosen = {SETTINGS[key].title: SETTINGS[key].applied(config) for key in settings}
    if own and config not in chosen.values():
        chosen["the model's own settings"] = config
    highest = max(temperatures)
    erasable = {name: measured(name, "erasable", highest, settings)[0] for name, settings in chosen.items()}
    found += erasable.values()
    if erasable:
        name = max(erasable, key=lambda name: erasable[name].avg.value or 0.0)
        found += [measured(name, "erasable", t, chosen[name])[0] for t in temperatures if t != highest]
    return found


@dataclass(frozen=True)
class Contest:
    """The best erasable decoding against the best plain one, each chosen on the half of the problems it is not shown on."""

    plain: tuple[str, ...]
    erasable: tuple[str, ...]
    avg: Estimate  # erasable minus plain
    passed: Estimate
    tokens: float  # erasable over plain


def contest(found: Sequence[Decoding]) -> Contest:
    """Cross-fitted: chosen on even problems and compared on odd ones, and the other way round."""
    problems = len(found[0].correct_P)
    halves = [np.arange(problems) % 2 == 0, np.arange(problems) % 2 == 1]
    avg, passed = np.zeros(problems), np.zeros(problems)
    names: dict[str, list[str]] = {"plain": [], "erasable": []}
    ratios = []
    for shown, other in (halves, halves[::-1]):
        best = {kind: _best([d for d in found if d.kind == kind], other) for kind in names}
        for kind, decoding in best.items():
            names[kind].append(decoding.name)
        avg[shown] = (np.array(best["erasable"].correct_P) - np.array(best["plain"].correct_P))[shown]
        passed[shown] = (np.array(best["erasable"].passed_P) - np.array(best["plain"].passed_P))[shown]
        ratios.append(best["erasable"].tokens / best["plain"].tokens)
    index = np.arange(problems)
    return Contest(
        tuple(names["plain"]),
        tuple(names["erasable"]),
        mean_by_problem(avg, index),
        mean_by_problem(passed, index),
        sum(ratios) / len(ratios),
    )


def _best(candidates: Sequence[Decoding], where: np.ndarray) -> Decoding:
    return max(candidates, key=lambda d: float(np.array(d.correct_P)[where].mean()))
