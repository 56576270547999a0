"""The chaos tests in short: some kills and some damaged files of one small run."""

from pathlib import Path

from tests.chaos.cluster import simulate
from tests.chaos.damage import try_damage
from tests.chaos.faults import try_faults, try_power_cuts
from tests.chaos.kills import RECIPE, chaos

SMALL = (
    RECIPE.replace("steps = 7", "steps = 2")
    .replace("save_steps = 3", "save_steps = 1")
    .replace("eval_steps = 4", "eval_steps = 0")
    .replace("num_generations = 4", "num_generations = 2")
    .replace("[eval]\nlimit = 2", "[eval]\nlimit = 1\nerasable = false")
)


def test_killed_runs_end_in_the_same_bits(tmp_path: Path):
    tally = chaos(tmp_path, kills=3, seed=5, recipe=SMALL)
    assert tally.differing == []
    assert (tally.kills, tally.identical) == (3, tally.runs)
    assert tally.resumes > 0
    assert len(tally.wheres) >= 2


def test_damaged_files_are_named_or_make_no_difference(tmp_path: Path):
    verdicts = try_damage(tmp_path, seconds=60, trials=12, seed=3)
    assert verdicts.wrong == []
    assert verdicts.ended["identical"] > 0


def test_failing_calls_end_in_a_sentence_or_the_same_bits(tmp_path: Path):
    verdicts = try_faults(tmp_path, seconds=60, trials=6)
    assert verdicts.wrong == []
    assert verdicts.ended["identical"] > 0


def test_after_a_power_cut_what_was_synced_is_enough(tmp_path: Path):
    verdicts = try_power_cuts(tmp_path, seconds=60, trials=4)
    assert verdicts.wrong == []
    assert verdicts.ended["identical"] > 0


def test_a_simulated_cluster_loses_nothing_and_mixes_nothing():
    counts = simulate(range(12))
    assert counts["groups"] > 100
    for kind in (
        "death",
        "request lost",
        "answer lost",
        "repeated",
        "trainer died",
        "weights offered in shared memory",
    ):
        assert counts[kind] > 0, kind
    simulate(range(205, 206))  # once, an answer with the same group twice ended the run
    assert simulate(range(3)) == simulate(range(3)), "a seed names the whole course of events"
