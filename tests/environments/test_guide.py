"""The classes of docs/environments.md, as they stand there, from the page to the reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e3rl.rewards.scorer import Scorer
from e3rl.types import Draw, Problem
from tests.docs.pages import ROOT, blocks
from tests.environments.worlds import CALL, add, answers, roll, world


def on_the_page(name: str) -> str:
    """The page's class, under the name that `world` asks for."""
    [body] = [b.body for b in blocks(ROOT / "docs" / "environments.md") if b.body.startswith(f"class {name}:")]
    return body.replace(f"class {name}:", "class Counter:")


def take(item: str, pieces: int) -> str:
    return CALL.format("take", json.dumps({"item": item, "pieces": pieces}))


def test_the_counter_counts_to_nine(tmp_path: Path):
    config = world(tmp_path, on_the_page("Counter"))
    [trajectory], tokens, _ = roll(config, answers(add(2), add(4), "Done."))
    assert "Count. It stands at 3." in tokens.decode(list(trajectory.prompt.ids))
    with Scorer(config.rewards) as scorer:
        assert [r.value for r in scorer.score([trajectory], [""])] == [1.0]


@pytest.mark.parametrize(("erase", "reward"), [("none", 0.9), ("errors", 1.0)])
def test_the_warehouse_takes_back_a_call_and_what_it_cost(tmp_path: Path, erase: str, reward: float):
    config = world(tmp_path, on_the_page("Warehouse"), erase=erase)

    def says(context: str, draw: Draw) -> str:
        if "1 left" in context:
            return "Done."
        asked_too_much = draw.attempt == 0 and "there are" not in context
        return take("nails", 9 if asked_too_much else 4)

    row = Problem("p", "Take four.", {"nails": 1}, {"stock": {"nails": 5}})
    [trajectory], _, _ = roll(config, says, row)
    assert len(trajectory.erasures) == (erase == "errors")
    with Scorer(config.rewards) as scorer:
        assert [r.value for r in scorer.score([trajectory], [""])] == [pytest.approx(reward)]
