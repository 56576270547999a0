"""The whole diagnosis on the embedded model, and what is made of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from e3rl.cli.diagnose import SETTINGS as NAMED
from e3rl.cli.main import main
from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.diagnose.advice import (
    advise,
    on_decoding,
    on_erasing_in_training,
    on_late_evidence,
    on_retries,
    on_settings,
    on_training,
    on_uncertainty,
)
from e3rl.diagnose.decoding import HALF_EPS, LATE, LATE_EPS, LATE_EPS_LENGTH, SETTINGS, Contest, Decoding
from e3rl.diagnose.diagnosis import EVERYWHERE, Diagnosis, RetryGain, Signal, assess_retries
from e3rl.diagnose.sampling import Fork
from e3rl.diagnose.signals import PAPER, SIGNALS, measure
from e3rl.diagnose.statistics import UNKNOWN, Estimate
from e3rl.rollout.metric import e3rl_uncertainty
from e3rl.rollout.moments import Moments
from e3rl.types import Candidate


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("diagnosis")
    settings = ["rollout.num_generations=4", "rollout.max_rows=64", "rollout.cache_rows=64"]
    arguments = ["diagnose", "lab", "lab:chain:2", "--problems", "8", "--retries", "2", "--recipe", "demo"]
    assert main([*arguments, "--output", str(directory), *settings]) == 0
    return directory


def test_everything_is_measured(written: Path):
    found = json.loads((written / "diagnosis.json").read_text(encoding="utf-8"))
    assert found["by_steps"] is True
    assert [s["name"] for s in found["signals"]] == list(SIGNALS)
    assert all(0 <= s["overall"]["value"] <= 1 for s in found["signals"])
    kinds = [d["kind"] for d in found["decodings"]]
    assert kinds.count("plain") == 3
    assert {"majority", "erasable"} <= set(kinds)
    assert sum(e["count"] for e in found["gains"][0]["gains"]) == 8 * 4  # one fork a sample
    plain = {d["temperature"]: d for d in found["decodings"] if d["kind"] == "plain"}
    assert plain[1.0]["avg"]["value"] == pytest.approx(found["accuracy"]["value"], abs=0.3)
    vote = next(d for d in found["decodings"] if d["name"] == "majority of 4, T = 1")
    assert vote["tokens"] == pytest.approx(4 * plain[1.0]["tokens"])
    assert len(found["findings"]) == 7
    assert 3 <= found["segments"] <= 5  # 22 to 40 tokens of an answer, 12 a segment


def test_the_page_holds_its_figures_and_loads_nothing(written: Path):
    page = (written / "diagnosis.html").read_text(encoding="utf-8")
    assert 'id="diagnosis"' in page
    assert "connect-src 'self'" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "3"], "--problems must be at least 4"),
        (["--retries", "0"], "--retries at least 1"),
        (["--settings", "hole"], "unknown erasure setting 'hole'. Did you mean 'whole'?"),
        (["--temperatures", "0"], "--temperatures must be above 0"),
        (["rollout.num_generations=1"], "rollout.num_generations must be at least 2"),
    ],
)
def test_what_can_not_be_diagnosed_is_refused(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert main(["diagnose", "lab", "lab:chain:2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_signals_agree_with_the_judge():
    """'U, paper' is what the judge computes with the default weights, and U + ε what it computes with ε at weight 1."""
    candidate = Candidate((3, 4, 5), (-0.5, -1.0, -0.1), (0.4, 1.2, 0.3), (0.0, 0.7, 0.0), (1.0,) * 3, (1, 2, 1), False)
    reference, history = Moments.of((0.2, 0.9, 1.1)), (0.8,)
    found = measure(candidate, history, reference, None)
    assert found["U, paper"] == pytest.approx(e3rl_uncertainty(candidate, history, reference, PAPER).total)
    with_eps = replace(PAPER, perturbation_weight=1.0)
    assert found["U + ε"] == pytest.approx(e3rl_uncertainty(candidate, history, reference, with_eps).total)
    assert found["cross-entropy"] == pytest.approx(1.6 / 3)
    assert found["surprise"] == pytest.approx(1.6 / 3 - 1.9 / 3)
    assert "entropy after" not in found
    assert measure(candidate, history, reference, candidate)["entropy after"] == pytest.approx(1.9 / 3)


def test_retries_are_compared_by_quarter_of_the_signal():
    forks = [
        Fork(f"p{i}", {"U, paper": i, "ε, mean": 7 - i, "cross-entropy": 0.0}, first_right=i < 6, retries_right=0.75)
        for i in range(8)
    ]
    by_name = {gain.signal: gain for gain in assess_retries(forks)}
    assert [e.value for e in by_name["U, paper"].gains] == [-0.25, -0.25, -0.25, 0.75]
    assert [e.value for e in by_name["ε, mean"].gains] == [0.75, -0.25, -0.25, -0.25]
    assert [e.count for e in by_name["cross-entropy"].gains] == [8, 0, 0, 0]  # all alike: none is suspicious


def diagnosis(
    *,
    avg: Estimate,
    passed: Estimate,
    within: Estimate,
    mixed: float = 0.5,
    success: float = 0.2,
    segments: float = 4.0,
) -> Diagnosis:
    signals = tuple(Signal(name, "", False, Estimate(0.9, 0.8, 1.0, 9), within) for name in SIGNALS)
    fight = Contest(("plain, T = 0.6",) * 2, ("ε, κ₀ = 1",) * 2, avg, passed, 1.1)
    accuracy = Estimate(success, 0.1, 0.3, 9)
    eps = Decoding("ε, κ₀ = 1", "erasable", 1.0, 9.0, accuracy, accuracy, (), (), ("erasure.kappa0=1.0",))
    return Diagnosis(
        "m", "d", 9, 8, 4, 12, segments, True, accuracy, mixed, signals, signals[:1], (), (eps,), fight, 1.0
    )


ZERO, BETTER = Estimate(0.0, -0.05, 0.05, 9), Estimate(0.1, 0.04, 0.16, 9)


@pytest.mark.parametrize(
    ("avg", "passed", "words"),
    [
        (BETTER, ZERO, r"^Decode with ε, κ₀ = 1: \+10.0 points \(\+4.0 to \+16.0\) over plain, T = 0.6"),
        (ZERO, BETTER, r"^Where you take several samples, decode with ε, κ₀ = 1"),
        (ZERO, ZERO, r"^Decode plainly \(plain, T = 0.6\)"),
        (Estimate(0.03, -0.04, 0.1, 9), Estimate(-0.1, -0.2, -0.01, 9), r"^Decode plainly"),
        (
            Estimate(0.03, -0.04, 0.1, 9),
            ZERO,
            r"^Whether erasing beats plain, T = 0.6 can't be said from so few problems",
        ),
    ],
)
def test_the_recommendation_follows_the_intervals(avg, passed, words):
    assert re.match(words, on_decoding(diagnosis(avg=avg, passed=passed, within=ZERO)).text)


def test_a_retry_that_is_right_more_often_may_not_be_worth_its_tokens():
    """Eight problems of four segments: those with U of 3 gain half a right answer or more, for four tokens more."""
    forks = [
        Fork(f"p{i}", {"U, paper": u, "ε, mean": 1.0, "cross-entropy": 0.0}, False, (0.5 + i / 40) * (u > 2), 4.0)
        for i in range(8)
        for u in range(4)
    ]
    cheap, dear = ({g.signal: g.above for g in assess_retries(forks, rate)} for rate in (0.02, 0.2))
    assert cheap == {"U, paper": 2.25, "ε, mean": EVERYWHERE, "cross-entropy": EVERYWHERE}
    assert set(dear.values()) == {None}
    found = replace(
        diagnosis(avg=ZERO, passed=ZERO, within=BETTER),
        gains=(RetryGain("U, paper", (Estimate(0.1, 0.0, 0.2, 9),) * 4, (0.5, 1.0, 2.25), 2.25),),
    )
    assert "worth its tokens where 'U, paper' is above 2.25" in on_retries(found).text
    nowhere = replace(found, gains=(replace(found.gains[0], above=None),))
    assert "Nowhere is a retry shown to be worth its tokens" in on_retries(nowhere).text
    assert (
        "worth its tokens everywhere" in on_retries(replace(found, gains=(replace(found.gains[0], above=-1.0),))).text
    )


def test_a_recommended_way_comes_with_its_settings():
    found = on_settings(diagnosis(avg=BETTER, passed=ZERO, within=ZERO))
    assert found is not None
    assert found.text.endswith("with this diagnosis's recipe and: erasure.kappa0=1.0")
    assert on_settings(diagnosis(avg=ZERO, passed=ZERO, within=ZERO)) is None


def test_a_blind_uncertainty_is_called_blind():
    blind, seeing = Estimate(0.55, 0.45, 0.65, 30), Estimate(0.8, 0.7, 0.9, 30)
    assert on_uncertainty(diagnosis(avg=ZERO, passed=ZERO, within=blind)).level == "warn"
    assert on_uncertainty(diagnosis(avg=ZERO, passed=ZERO, within=seeing)).level == "good"
    faint = Estimate(0.58, 0.55, 0.61, 30)
    assert "hardly tells" in on_uncertainty(diagnosis(avg=ZERO, passed=ZERO, within=faint)).text
    backwards = Estimate(0.3, 0.2, 0.4, 30)
    assert "points the wrong way" in on_uncertainty(diagnosis(avg=ZERO, passed=ZERO, within=backwards)).text
    assert "can't be compared" in on_uncertainty(diagnosis(avg=ZERO, passed=ZERO, within=UNKNOWN)).text


def test_silent_mistakes_are_told_from_those_that_show():
    blind, seeing = Estimate(0.55, 0.45, 0.65, 30), Estimate(0.8, 0.7, 0.9, 30)
    assert on_late_evidence(diagnosis(avg=ZERO, passed=ZERO, within=blind)).text.startswith("Mistakes are silent")
    assert "Judge long segments" in on_late_evidence(diagnosis(avg=ZERO, passed=ZERO, within=seeing)).text
    faint = Estimate(0.58, 0.52, 0.66, 30)
    assert on_late_evidence(diagnosis(avg=ZERO, passed=ZERO, within=faint)).text.startswith("Mistakes hardly show")
    wide = Estimate(0.75, 0.44, 1.0, 6)
    assert "can't be said from so few" in on_late_evidence(diagnosis(avg=ZERO, passed=ZERO, within=wide)).text
    assert on_late_evidence(diagnosis(avg=ZERO, passed=ZERO, within=UNKNOWN)) is None


def test_late_settings_cut_the_response_anew():
    config = load_config(None, (), ["rollout.segment_length=8", "rollout.max_segments=5"])
    late = SETTINGS[LATE].applied(config)
    assert (late.rollout.segment_length, late.rollout.max_segments, late.rollout.completion_limit) == (40, 1, 40)
    assert (late.erasure.smoothing_window, late.erasure.rho, late.erasure.base_weight) == (0, 0.0, 1.0)
    half = SETTINGS[HALF_EPS].applied(config)
    assert (half.rollout.segment_length, half.rollout.max_segments) == (20, 2)
    assert SETTINGS["eps-1"].applied(config).rollout == config.rollout
    odd = (
        SETTINGS[HALF_EPS]
        .applied(load_config(None, (), ["rollout.segment_length=7", "rollout.max_segments=1"]))
        .rollout
    )
    assert (odd.segment_length, odd.max_segments, odd.completion_limit) == (4, 2, 7)
    recommended = load_config(find_recipe("recommended"))
    assert SETTINGS[HALF_EPS].applied(recommended) == recommended  # or it would be measured twice
    truncated = load_config(None, (), ["erasure.entropy_distribution=truncated"])
    assert SETTINGS[LATE_EPS].applied(truncated).erasure.entropy_distribution == "full"  # else it is refused
    static = load_config(None, (), ["erasure.baseline=static"])
    assert SETTINGS["paper-1"].applied(static).erasure.baseline == "group"
    doubted = load_config(None, (), ["erasure.length_exponent=1.0"])
    weighed = [SETTINGS[name].applied(doubted).erasure.length_exponent for name in (LATE_EPS, LATE_EPS_LENGTH)]
    assert weighed == [0.0, 0.5]  # a setting is the same whatever the recipe says
    calm = SETTINGS[LATE_EPS].applied(config).erasure
    assert (calm.baseline, calm.quantile, calm.perturbation_weight, calm.entropy_temperature) == (
        "quantile",
        0.2,
        0.3,
        1.0,
    )


def test_the_help_names_every_setting():
    assert ", ".join(SETTINGS) == NAMED


def test_groups_without_a_signal_are_pointed_out():
    assert "too hard" not in on_training(diagnosis(avg=ZERO, passed=ZERO, within=ZERO)).text
    assert "Take easier" in on_training(diagnosis(avg=ZERO, passed=ZERO, within=ZERO, mixed=0.1)).text
    assert len(advise(diagnosis(avg=ZERO, passed=ZERO, within=ZERO))) == 6  # without forks no sentence on retries


@pytest.mark.parametrize(
    ("success", "segments", "auroc", "words"),
    [
        (
            0.1,
            8.2,
            0.85,
            r"with 8.2 segments .* at most 1.75 times .* AUROC 0.85: .* could pay \(below 0.20\).* as a reward",
        ),
        (0.25, 8.2, 0.85, r"at most 0.84 times .* doesn't pay, train plainly \(it could below 0.20\)"),
        (0.1, 2.0, 0.55, r"at most 0.58 times .* train plainly. A judge of 0.95 could do 1.08 times"),
        (0.02, 1.0, 0.95, r"doesn't pay, train plainly \(at no success rate could it\)"),
    ],
)
def test_training_with_erasing_is_held_against_its_bound(success, segments, auroc, words):
    within = Estimate(auroc, auroc, auroc, 9)
    found = diagnosis(avg=ZERO, passed=ZERO, within=within, success=success, segments=segments)
    assert re.search(words, on_erasing_in_training(found).text)
