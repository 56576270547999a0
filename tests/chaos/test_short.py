"""The chaos test in short: some kills, one after the other, of one small run."""

from pathlib import Path

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
