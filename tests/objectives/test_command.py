"""`e3rl objectives` lists what there is, explains one, and answers mistakes in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from e3rl.cli import main
from e3rl.objectives import OBJECTIVES, options

EXAMPLE = Path(__file__).parents[2] / "examples" / "objective_reinforce.py"


def test_all_objectives_are_listed_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    blocks = {block.split()[0]: block for block in capsys.readouterr().out.strip().split("\n\n")}
    assert list(blocks) == list(OBJECTIVES)
    for name, block in blocks.items():
        assert all(f"  {o.name} = {o.default!r}" in block and o.metadata["help"] in block for o in options(name))
    assert "no options" in blocks["sft"]
    assert "kl_coef = 0.04, at least 0\n      beta" in blocks["e3rl"]
    assert "[paper, app. D]" in blocks["e3rl"]
    assert "allocation = 'causal', one of 'causal', 'sequence', 'anchored', 'value'" in blocks["e3rl"]
    assert "clip_low = 0.2, at least 0 and at most 1" in blocks["grpo"]


def test_one_objective_can_be_asked_for_and_come_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", f"{EXAMPLE}:Reinforce"]) == 0
    assert "entropy_weight = 0.0, at least 0" in capsys.readouterr().out
    assert main(["objectives", "grop"]) == 2
    assert "Did you mean 'grpo'?" in capsys.readouterr().err
    assert main(["objectives", "math:pi"]) == 2
    assert "objective 'math:pi' breaks its contract: it must be a class" in capsys.readouterr().err
