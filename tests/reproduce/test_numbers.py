"""The papers' numbers, and the statistics that ours are reported with."""

import math
from random import Random

import pytest

from e3rl_reproduce.paper import paper_mean, paper_models, paper_row
from e3rl_reproduce.perturb import positions
from e3rl_reproduce.results import difference, estimate


def test_the_papers_headlines_follow_from_its_tables():
    def ahead(model: str, baseline: str) -> float:
        ours, theirs = (paper_mean("table1", model, row, "avg@32") for row in ("E3RL", baseline))
        assert ours
        assert theirs
        return round(100 * (ours / theirs - 1), 3)

    assert ahead("Qwen3-4B", "SAPO") == 5.349
    assert ahead("Qwen3-8B", "SAPO") == 6.514
    assert ahead("Qwen3-8B", "DAPO") == 4.286  # the best baseline there, which the abstract does not name
    mean = paper_mean("table5", "Qwen3-8B", "16x512", "avg@32")
    assert mean is not None
    assert round(mean, 3) == 0.590


def test_the_tables_are_whole():
    sizes = {
        "table1": (2, 6, 7), "table2": (1, 7, 7), "table3": (1, 7, 7), "table4": (1, 3, 7), "table5": (1, 5, 7),
        "table6": (2, 6, 7), "table7": (1, 7, 7), "table8": (1, 7, 7),
    }  # fmt: skip
    rows = {"table1": "GRPO", "table6": "GRPO", "table4": "erase@1", "table5": "32x256"}
    for table, (models, _, benchmarks) in sizes.items():
        names = paper_models(table)
        assert len(names) == models
        assert all(len(paper_row(table, model, rows.get(table, "E3RL"))) == benchmarks for model in names)
    assert len(paper_row("table6", "Qwen3-4B", "GRPO")["AMC 2023"]) == 7
    assert paper_row("erpo-table1", "Qwen2.5-7B", "ERPO")["AMC23"] == {"avg@16": 0.4953, "boxed@16": 0.9813}


def test_a_value_that_the_paper_leaves_out_leaves_no_mean():
    assert paper_row("table7", "Qwen3-4B", "w/o extremum deviation")["AIME 2024"]["pass@32"] is None
    assert paper_mean("table7", "Qwen3-4B", "w/o extremum deviation", "pass@32") is None


def test_the_interval_is_students():
    found = estimate([0.4, 0.5, 0.6])
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(0.5), 3)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert found.text() == "0.500 ± 0.248"


def test_one_seed_has_no_interval_and_none_no_estimate():
    alone = estimate([0.25])
    assert alone is not None
    assert alone.text(sign=True) == "+0.250"
    assert estimate([]) is None


def test_differences_are_paired_by_seed():
    found = difference({0: 0.5, 1: 0.9, 2: 0.1}, {0: 0.4, 1: 0.7})
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(0.15), 2)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_perturbed_places_are_the_extremes_and_never_the_end():
    entropies = [0.5, 0.1, 0.9, 0.2, 0.8, 99.0]
    found = positions(entropies, 0.4, Random(0))
    assert (found["most uncertain"], found["least uncertain"]) == ([4, 2], [1, 3])
    assert len(found["random"]) == 2
    assert 5 not in found["random"]
    assert [len(v) for v in positions(entropies, 0.05, Random(0)).values()] == [1, 1, 1]


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (4, 3.182), (11, 2.228), (31, 2.042)])
def test_the_quantile_is_students_for_any_number_of_seeds(seeds: int, t: float):
    found = estimate([0.0, 1.0] * (seeds // 2) + [0.5] * (seeds % 2))
    assert found is not None
    spread = math.sqrt((seeds // 2 * 2) * 0.25 / (seeds - 1))
    assert found.half_width == pytest.approx(t * spread / math.sqrt(seeds), rel=2e-4)
