"""Each rule speaks when its case is there and is silent in a healthy run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from e3rl.config import build_config
from e3rl.report.health import RULES, Logs, examine

HEALTHY = {
    "loss": -0.01,
    "grad_norm": 0.5,
    "reward": 0.5,
    "accuracy": 0.5,
    "reward_missing": 0,
    "degenerate_groups": 0.2,
    "erase_rate": 0.1,
    "r": 0.1,
    "forced_rate": 0.01,
    "kl": 0.02,
    "entropy": 0.6,
    "clip_fraction": 0.05,
    "finish_ratio": 0.97,
    "mismatch_mean": 1e-6,
    "mismatch_ess": 1.0,
    "sign_flips": 0.1,
    "seconds_rollout": 4.0,
    "seconds_reward": 0.2,
    "seconds_train": 2.0,
    "memory_mb": 900.0,
}


def logs(late: Mapping[str, Any] = {}, early: Mapping[str, Any] = {}, steps: int = 40, **sections: Any) -> Logs:
    """A healthy run whose first half is overlaid with ``early`` and whose second half with ``late``."""
    records = [HEALTHY | {"step": n + 1} | (early if n < steps // 2 else late) for n in range(steps)]
    return Logs(records, [], build_config(sections))


def texts(found: Logs) -> str:
    return "\n".join(f.text for f in examine(found))


def evaluation(step: int, average: float, mode: str = "plain") -> dict[str, Any]:
    return {"step": step, "mode": mode, "samples": 8, "avg@8": average, "ci95": [average - 0.03, average + 0.03]}


def test_a_healthy_run_is_called_healthy() -> None:
    assert [(f.level, f.text) for f in examine(logs())] == [("good", "Nothing looks wrong.")]


def test_of_a_short_run_the_halves_are_compared() -> None:
    sharp = {"entropy": 0.05}
    assert "Token entropy fell from 0.600 to 0.050 nats" in texts(logs(sharp, steps=8))
    assert texts(logs(sharp, steps=6)) == "Nothing looks wrong."  # three steps tell of no change


def test_rewards_without_right_and_wrong_blame_no_problem() -> None:
    told = texts(logs({"degenerate_groups": 0.9, "accuracy": None}, early={"accuracy": None}))
    assert "a reward that tells answers apart, or other problems, would" in told


def test_a_run_without_steps_says_so() -> None:
    assert texts(Logs([], [], build_config({}))) == "No step is done yet."


@pytest.mark.parametrize(
    ("late", "level", "sentence"),
    [
        ({"reward_restarts": 1}, "warn", "was restarted, 20×"),
        ({"reward": 0.09}, "bad", "Reward fell from 0.500 in the first 10 steps to 0.090 in the last 10"),
        ({"reward": 0.0, "degenerate_groups": 1.0, "accuracy": 0.0}, "bad", "the policy has diverged"),
        ({"loss": None}, "bad", "not a finite number at steps 21, 22, 23 and later"),
        ({"reward_missing": 2}, "warn", "failed on 40 trajectories"),
        ({"degenerate_groups": 0.8, "accuracy": 0.05}, "warn", "Reward is flat and 80% of the groups teach nothing"),
        ({"degenerate_groups": 0.9, "accuracy": 0.05}, "warn", "too hard"),
        ({"degenerate_groups": 0.9, "accuracy": 0.98, "reward": 0.98}, "warn", "too easy"),
        ({"degenerate_groups": 0.75, "accuracy": 0.61}, "warn", "always right or always wrong: give problems between"),
        ({"r": 0.9}, "warn", "Erased tokens come to 90%"),
        ({"forced_rate": 0.4}, "warn", "40% of the segments were accepted only because"),
        ({"kl": 0.3}, "warn", "KL to the reference policy is rising, from 0.020 to 0.300"),
        ({"entropy": 0.05}, "warn", "entropy fell from 0.600 to 0.050"),
        ({"clip_fraction": 0.5}, "warn", "50% of the ratios are clipped"),
        ({"finish_ratio": 0.4}, "warn", "Only 40% of the responses end by themselves; the rest are cut at 8192 tokens"),
        ({"mismatch_mean": 0.2}, "warn", "0.200 apart"),
        ({"mismatch_ess": 0.5}, "warn", "off-policy"),
        ({"sign_flips": 0.4}, "note", "40% of the positions"),
        ({"seconds_reward": 6.0}, "note", "50% of the time goes into rewards"),
    ],
)
def test_one_thing_wrong_is_the_one_thing_said(late: dict[str, Any], level: str, sentence: str) -> None:
    found = [f for f in examine(logs(late)) if f.text != "Nothing looks wrong."]
    assert [f.level for f in found] == [level]
    assert sentence in found[0].text


def test_keeping_the_sign_is_advised_only_where_attention_divides_the_reward() -> None:
    flipped = {"sign_flips": 0.4}
    assert "keeps the sign" in texts(logs(flipped, objective={"name": "e3rl", "allocation": "causal"}))
    for other in ({"name": "e3rl", "allocation": "value"}, {"name": "erpo"}, {"name": "rloo"}):
        assert "keeps the sign" not in texts(logs(flipped, objective=other))


def test_time_in_rewards_is_a_share_of_ten_steps_after_the_first() -> None:
    waits = {"seconds_reward": 6.0}
    assert "of the time" not in texts(logs(waits, waits, steps=10))
    assert "50% of the time goes into rewards" in texts(logs(waits, waits, steps=11))
    first = logs(steps=11)
    assert "of the time" not in texts(
        replace(first, metrics=[first.metrics[0] | {"seconds_reward": 900.0}, *first.metrics[1:]])
    )


def test_never_erasing_is_said_only_where_erasing_is_on() -> None:
    never = {"erase_rate": 0.0, "r": 0.0, "forced_rate": 0.0}
    assert "Erase rate 0" in texts(logs(never, never))
    assert "Erase rate 0" not in texts(logs(never, never, rollout={"erase": False}))
    assert "Erase rate 0" not in texts(logs(never, never, erasure={"max_erasures": 0}))
    assert "Erase rate 0" not in texts(logs(never))


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ("group", "erasure.kappa0, or run `e3rl calibrate`."),
        ("quantile", "erasure.quantile."),
        ("static", "erasure.static_baseline."),
    ],
)
def test_the_setting_that_would_change_how_much_is_erased_is_named(baseline: str, words: str) -> None:
    never, erasure = {"erase_rate": 0.0, "r": 0.0, "forced_rate": 0.0}, {"baseline": baseline}
    assert f"Lower {words}" in texts(logs(never, never, erasure=erasure))
    assert f"Raise {words}" in texts(logs({"r": 0.9}, erasure=erasure))


def test_a_judge_that_may_erase_nothing_forces_nothing() -> None:
    forced = {"forced_rate": 0.4}
    assert "used up" in texts(logs(forced, erasure={"max_erasures": 1}))
    assert "used up" not in texts(logs(forced, erasure={"max_erasures": 0}))


def test_reward_that_moved_is_not_called_flat() -> None:
    text = texts(logs({"degenerate_groups": 0.9, "accuracy": 0.9, "reward": 0.9}))
    assert text.startswith("90% of the groups teach nothing, since all")


def test_groups_of_one_reward_that_learn_by_contrast_are_told_so() -> None:
    flat, contrast = {"degenerate_groups": 0.9}, {"name": "e3rl", "erased": "contrast"}
    assert "90% of the groups teach nothing but what to erase, since" in texts(logs(flat, objective=contrast))
    for settings in ({"rollout": {"erase": False}}, {"erasure": {"max_erasures": 0}}):
        assert "teach nothing, since" in texts(logs(flat, objective=contrast, **settings))


def test_a_short_run_that_diverges_is_told_so_and_a_hard_one_is_not() -> None:
    assert "in the first 4 steps to 0.000 in the last 4" in texts(logs({"reward": 0.0}, steps=8))
    assert "diverged" not in texts(logs({"reward": 0.0}, steps=6))
    assert "diverged" not in texts(logs({"reward": 0.0}, {"reward": 0.05}))
    assert "diverged" not in texts(logs({"reward": 0.11}))


def test_growing_memory_is_noted() -> None:
    records = [HEALTHY | {"step": n, "memory_mb": 100.0 * n} for n in range(1, 41)]
    assert "2100 MiB half-way, 4000 MiB now" in texts(Logs(records, [], build_config({})))


@pytest.mark.parametrize(
    ("before", "after", "level", "words"),
    [
        (0.4, 0.5, "good", "rose from 0.400 to 0.500"),
        (0.5, 0.4, "bad", "fell from 0.500 to 0.400"),
        (0.4, 0.44, "note", "may be chance"),
    ],
)
def test_held_out_change_needs_intervals_apart(before: float, after: float, level: str, words: str) -> None:
    run = logs()
    judged = Logs(
        run.metrics, [evaluation(0, before), evaluation(0, 0.9, "erasable"), evaluation(40, after)], run.config
    )
    found = next(f for f in examine(judged) if f.text.startswith("Held-out Avg@8"))
    assert found.level == level
    assert words in found.text


def test_gravest_findings_come_first() -> None:
    levels = [f.level for f in examine(logs({"sign_flips": 0.4, "clip_fraction": 0.5, "grad_norm": None}))]
    assert levels == ["bad", "warn", "note"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_missing_metrics_raise_no_alarm(rule: Any) -> None:
    bare = Logs([{"step": n} for n in range(1, 41)], [], build_config({"rollout": {"erase": False}}))
    assert rule(bare) is None
