"""Lab problems: deterministic, different, split by content, solved by their own solutions."""

from __future__ import annotations

import pytest

from e3rl.errors import UserError
from e3rl.lab.problems import FAMILIES, LabSelection, first_error, generate, grade, half, load, parse, solution
from e3rl.types import Problem

LEVELS = [(family.name, level) for family in FAMILIES.values() for level in family.levels]


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_solutions_are_right_at_every_step(family: str, level: int) -> None:
    for problem in generate(family, level, "train", 40):
        assert first_error(problem, solution(problem)) is None
        assert grade(problem, solution(problem))
        assert not grade(problem, "")


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_problems_are_different_and_halves_share_nothing(family: str, level: int) -> None:
    train = {p.prompt for p in generate(family, level, "train", 100, seed=3)}
    heldout = {p.prompt for p in generate(family, level, "heldout", 100, seed=3)}
    assert len(train) == len(heldout) == 100
    assert not train & heldout


def test_whole_halves_of_a_small_level_share_no_question_in_other_words() -> None:
    def contents(split: str) -> set[frozenset[str]]:
        problems = load("lab:arith:4", split)  # type: ignore[arg-type]
        return {frozenset(str(p.columns["solution"]).split(" = ")[0].split(" * ")) for p in problems}

    train, heldout = contents("train"), contents("heldout")
    assert len(train | heldout) == 36  # unordered pairs of 2..9
    assert not train & heldout


def test_a_graph_in_another_edge_order_stays_in_its_half() -> None:
    """The content of a path problem is its edges and ends, whatever their order."""
    rows = generate("path", 1, "train", 2000)
    sets = {tuple(sorted(str(p.prompt).split(";"))) for p in rows}
    heldout = {tuple(sorted(str(p.prompt).split(";"))) for p in generate("path", 1, "heldout", 2000)}
    assert not sets & heldout


def test_the_same_arguments_give_the_same_problems_and_more_of_them_go_on() -> None:
    assert generate("path", 2, "train", 20, seed=5) == generate("path", 2, "train", 50, seed=5)[:20]
    assert generate("path", 2, "train", 20, seed=5) != generate("path", 2, "train", 20, seed=6)


def test_problems_do_not_change_between_releases() -> None:
    first = generate("chain", 1, "heldout", 1)[0]
    assert first == Problem(
        id="chain-1-heldout-000000",
        prompt="00+4+5:",
        answer="09",
        columns={"family": "chain", "level": 1, "question": "00+4+5:", "solution": "00+4=04;04+5=09;A:09"},
    )
    assert generate("chain", 1, "train", 1, seed=2)[0].id == "chain-1-train-s2-000000"


def test_both_halves_get_about_half_of_the_contents() -> None:
    share = sum(half("chain", str(i)) == "train" for i in range(2000)) / 2000
    assert 0.45 < share < 0.55


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("lab:chain", LabSelection("chain", (FAMILIES["chain"].training_level,))),
        ("lab:path:2", LabSelection("path", (2,))),
        ("lab:chain:1-5", LabSelection("chain", (1, 2, 3, 4, 5))),
    ],
)
def test_names(name: str, selection: LabSelection) -> None:
    assert parse(name) == selection


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab:chian", "Did you mean 'chain'"),
        ("lab:chain:99", "no level 99"),
        ("lab:chain:0-2", "no level 0"),
        ("lab:chain:3-1", "lab:chain:1-3"),
        ("lab:chain:", "names no lab problems"),
        ("chain", "names no lab problems"),
    ],
)
def test_wrong_names_say_what_to_write(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(name)


def test_load_divides_a_count_among_the_levels() -> None:
    levels = [p.columns["level"] for p in load("lab:chain:1-3", "train", 8)]
    assert levels == [1, 1, 1, 2, 2, 2, 3, 3]
    assert len(load("lab:chain:1-2", "heldout")) == 512


def test_asking_for_more_than_there_is() -> None:
    with pytest.raises(UserError, match=r"has only \d+ train problems; 5000 were asked for"):
        generate("arith", 4, "train", 5000)
    with pytest.raises(UserError, match="unknown split"):
        generate("arith", 4, "test", 5)  # type: ignore[arg-type]


def test_foreign_problems_are_refused() -> None:
    with pytest.raises(UserError, match="'x' is not one of the lab's"):
        grade(Problem(id="x", prompt="1+1", answer="2"), "2")
