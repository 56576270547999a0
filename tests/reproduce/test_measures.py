"""What is measured is what the recipe says: sampling, and any number of samples on few rows."""

from __future__ import annotations

from typing import Any

from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.models import load_policy
from e3rl_reproduce.measures import exam

SIZES: dict[str, Any] = {"benchmarks": {"chain 1": "lab:chain:1", "chain 3": "lab:chain:3"}, "problems": 6}


def _exam(*settings: str, samples: int = 8, **options: Any) -> dict[str, Any]:
    config = load_config(find_recipe("lab"), overrides=settings)
    return exam(load_policy(config.model), config, **SIZES, samples=samples, **options)


def test_an_exam_decodes_as_the_recipe_says():
    cold, warm = (_exam(f"eval.temperature={t}") for t in (0.05, 1.0))
    assert cold["chain 3"]["right"] != warm["chain 3"]["right"]
    assert set(cold["chain 1"]["right"]) <= {0, 8}, "all but greedy"
    assert _exam("eval.temperature=1.0", "eval.top_k=1")["chain 1"]["right"] == cold["chain 1"]["right"]


def test_an_exam_of_more_samples_than_rows():
    few = _exam("rollout.num_generations=2", "rollout.cache_rows=4", "rollout.max_rows=4", samples=9)
    assert few["chain 3"]["right"] == _exam(samples=9)["chain 3"]["right"]
    erased = _exam("rollout.num_generations=4", "rollout.cache_rows=4", "rollout.max_rows=4", samples=9, erase=True)
    assert erased["chain 1"]["samples"] == 9
