"""How responses are read: which step is wrong, where it stands, and whether the final answer counts."""

from __future__ import annotations

from random import Random

import pytest

from e3rl.lab import arith, books, chain, maze, path, ways
from e3rl.lab.problems import FAMILIES
from e3rl.lab.reward import lab_reward

CHAIN = ("47+5-8+9:", "53")
PATH = ("ab;ac;bd;ad;de;cx;a>e:", "abde")
"""To e by b and d or by d alone; c leads to the dead end x."""


def read(family: str, question: tuple[str, str], response: str) -> list[tuple[str, bool]]:
    steps = FAMILIES[family].steps(*question, response)
    assert all(response[step.start : step.end] == step.text for step in steps)
    return [(step.text, step.right) for step in steps]


def test_chain_goes_on_from_a_mistake() -> None:
    response = "47+5=53;53-8=45;45+9=54;A:54\n"
    assert read("chain", CHAIN, response) == [
        ("47+5=53", False),
        ("53-8=45", True),
        ("45+9=54", True),
        ("A:54", True),
    ]
    assert not chain.grade(*CHAIN, response)


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        ("47+5=52;52-8=44;44+9=53;A:53", []),
        ("47+5=52;52-8=44;44+9=53;A:54", ["A:54"]),
        ("47+5=52;52+8=60", ["52+8=60"]),  # not the operation that was asked for
        ("47+5=52;50-8=42", ["50-8=42"]),  # not the number before
        ("47+5=52;A:52", ["A:52"]),  # too early
        ("47+5=52;52-8=44;44+9=53;A:53;A:53", ["A:53"]),  # too late
        ("97+5=02", ["97+5=02"]),
        ("", [""]),
    ],
)
def test_wrong_chain_steps(response: str, wrong: list[str]) -> None:
    assert [text for text, right in read("chain", CHAIN, response) if not right] == wrong


def test_chain_wraps_at_a_hundred() -> None:
    assert read("chain", ("97+5-8:", "94"), "97+5=02;02-8=94;A:94") == [
        ("97+5=02", True),
        ("02-8=94", True),
        ("A:94", True),
    ]


@pytest.mark.parametrize(("text", "right"), [("A:53", True), ("…A:53 \n", True), ("A:5", False), ("53", False)])
def test_chain_answer(text: str, right: bool) -> None:
    assert chain.grade(*CHAIN, text) is right


@pytest.mark.parametrize(
    ("response", "right", "solved"),
    [
        ("bde", [True, True, True], True),
        ("de", [True, True], True),  # another way
        ("bd", [True, True], False),  # stops early
        ("cxe", [False, False, False], False),  # a dead end, and a jump out of it
        ("cde", [False, False, True], False),  # after a jump the rest may be connected again
        ("bdex", [True, True, True, False], False),
        ("be", [True, False], False),
        ("", [], False),
    ],
)
def test_path_steps(response: str, right: list[bool], solved: bool) -> None:
    assert [ok for _, ok in read("path", PATH, response)] == right
    assert path.grade(*PATH, response) is solved


@pytest.mark.parametrize("level", path.FAMILY.levels)
def test_every_graph_has_a_wrong_turn(level: int) -> None:
    rng = Random(level)
    for _ in range(20):
        task = path.draw(level, rng)
        *edges, ends = task.question[:-1].split(";")
        way = ends[0] + task.answer
        turns = [way[1 : way.index(edge[0]) + 1] + edge[1] for edge in edges if edge[0] in way and edge[1] not in way]
        right = [path.steps(task.question, task.answer, turn)[-1].right for turn in turns]
        assert not all(right)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The answer is 19.", True),
        ("12 + 7 = 19", True),
        ("19.0", True),
        ("7+12 is 19, not 18", False),
        ("12-7=-19", False),
        ("31-12=19", True),
        ("nineteen", False),
    ],
)
def test_arithmetic_is_graded_by_the_last_number(response: str, right: bool) -> None:
    assert arith.grade("What is 7 + 12?", "19", response) is right


def test_arithmetic_has_one_step() -> None:
    (step,) = arith.steps("What is 7 + 12?", "19", "7 + 12 = 18.")
    assert (step.start, step.end, step.text, step.right) == (9, 11, "18", False)
    assert arith.steps("What is 7 + 12?", "19", "I can't say.") == []


def test_reward_reads_texts_and_chat_messages_and_skips_foreign_rows() -> None:
    rewards = lab_reward(
        prompts=["", "", "", ""],
        completions=["A:53", [{"role": "assistant", "content": "de"}], "dc", "whatever"],
        completion_ids=None,
        answer=["53", "abde", "abde", "1"],
        family=["chain", "path", "path", None],
        question=[CHAIN[0], PATH[0], PATH[0], None],
        level=[1, 1, 1, None],
    )
    assert rewards == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize("level", ways.FAMILY.levels)
def test_all_ways_of_a_ways_graph_are_right_and_its_dead_ends_wrong(level: int) -> None:
    """Found by walking the graph from its start: as many ways as the level says, each as long, and the rest leads nowhere."""
    shape = ways._SHAPES[level]
    task = ways.draw(level, Random(level))
    *edges, ends = task.question.rstrip(":").split(";")
    start, target = ends.split(">")
    walks, frontier = [], [start]
    while frontier:
        walk = frontier.pop()
        after = [edge[1] for edge in edges if edge[0] == walk[-1]]
        walks += [] if after else [walk]
        frontier += [walk + node for node in after]
    reached = [walk for walk in walks if walk[-1] == target]
    assert sorted(map(len, reached)) == [shape.length + 1] * shape.ways
    assert len(walks) - len(reached) == shape.dead_ends
    assert all(ways.FAMILY.grade(task.question, task.answer, walk[1:]) for walk in reached)
    assert not any(ways.FAMILY.grade(task.question, task.answer, walk[1:]) for walk in walks if walk not in reached)


def test_the_answer_of_a_ways_graph_is_one_way_at_random() -> None:
    """Two ways of equal length: the answer is the one that the question happens to name first about half of the time."""
    tasks = [ways.draw(1, Random(seed)) for seed in range(200)]
    named = [next(e[0] for e in t.question.split(";")[:-1] if e[1] == t.answer[-1]) for t in tasks]
    assert 0.35 < sum(t.answer[-2] == first for t, first in zip(tasks, named, strict=True)) / 200 < 0.65


BOOKS = ("qxv47+5:", "53")
"""+5, then -8 and +9."""


def booked(*said: str) -> str:
    """Sums and results in turn, as a decoded response has them."""
    return "".join(books._CALL.format(text) if n % 2 == 0 else text for n, text in enumerate(said))


@pytest.mark.parametrize(
    ("response", "right", "solved"),
    [
        (booked("52", "-8", "44", "+9", "53", "ok") + "A:53", [True] * 4, True),
        (booked("53", "-8", "45", "+9", "54", "ok") + "A:54", [False, True, True, True], False),
        (booked("52", "-8", "44", "+9", "53", "ok") + "A:54", [True, True, True, False], False),
        (booked("52", "-8") + "A:52", [True, False], False),  # too early
        (booked("52", "-8", "4", "+9", "53"), [True, False, False], False),
        (booked("53", "{'error': 'wrong'}") + "A:53", [False, True], True),  # a guess
        ("A:", [False], False),
        ("", [], False),
    ],
)
def test_books_steps(response: str, right: list[bool], solved: bool) -> None:
    assert [ok for _, ok in read("books", BOOKS, response)] == right
    assert books.FAMILY.grade(*BOOKS, response) is solved


def opened(checked: str) -> books.Books:
    made = books.Books()
    made.reset(operations=["+5", "-8", "+9"], question=BOOKS[0], checked=checked, level=1, answer="53")
    return made


def test_right_bookings_close_the_books() -> None:
    for checked in (books.AT_ONCE, books.AT_THE_END):
        made = opened(checked)
        assert [made.book(total) for total in ("52", "44", "53")] == ["-8", "+9", "ok"]
        assert made.get_reward() == 1.0
        with pytest.raises(ValueError, match="closed"):
            made.book("53")


def test_a_wrong_booking_is_seen_at_once_or_at_the_end_and_can_only_be_taken_back_from_outside() -> None:
    made = opened(books.AT_ONCE)
    before = made.snapshot()
    with pytest.raises(ValueError, match="wrong"):
        made.book("53")
    with pytest.raises(ValueError, match="closed"):
        made.book("52")
    made.restore(before)
    assert [made.book(total) for total in ("52", "44", "53")] == ["-8", "+9", "ok"]
    made = opened(books.AT_THE_END)
    assert [made.book(total) for total in ("53", "45")] == ["-8", "+9"]
    with pytest.raises(ValueError, match="wrong"):
        made.book("54")
    assert made.get_reward() == 0.0


MAZE = ("ab;bc;cd;be;ef;cg;gh;dx;a>x:", "ab;bc;cd;dx")
"""From b to c or into the corridor e, f; from c to d or into g, h."""


@pytest.mark.parametrize(
    ("response", "right", "solved"),
    [
        ("ab;bc;cd;dx", [True] * 4, True),
        ("ab;be;ef;<b;bc;cd;dx", [True, False, False, True, True, True, True], True),  # out of a dead end
        ("ab;be;ef;?be;<b;bc;cd;dx", [True, False, False, True, True, True, True, True], True),  # and checked
        ("ab;be;ef;?bf;<b;bc;cd;dx", [True, False, False, False, True, True, True, True], False),  # no such edge
        ("ab;be;ef;fd;dx", [True, False, False, False, True], False),  # a hop, and on from there
        ("ab;be;ef;fx", [True, False, False, False], False),  # a guess
        ("ab;be;ef;<c;cd;dx", [True, False, False, False, True, True], False),  # back to where it never was
        (
            "ab;be;ef;<b;be;ef;<b;bc;cd;dx",
            [True, False, False, True, False, False, True, True, True, True],
            True,
        ),  # a loop
        ("ab;cd;dx", [True, False, True], False),
        ("ab;bc;<b;bc;cd", [True] * 5, False),  # cut off
        ("ab;bc;cd;dx;", [True] * 4 + [False], False),
        ("ab;bc;cd;d", [True, True, True, False], False),
        ("", [False], False),
    ],
)
def test_maze_steps(response: str, right: list[bool], solved: bool) -> None:
    assert [ok for _, ok in read("maze", MAZE, response)] == right
    assert maze.FAMILY.grade(*MAZE, response) is solved


@pytest.mark.parametrize("level", maze.FAMILY.levels)
def test_a_wrong_door_of_a_maze_is_as_good_as_the_right_one_until_its_corridor_ends(level: int) -> None:
    """Every room has two doors; behind the wrong one as many moves are allowed as there are to the next room."""
    shape, task = maze._SHAPES[level], maze.draw(level, Random(level))
    *edges, ends = task.question[:-1].split(";")
    doors = {edge[0]: [other[1] for other in edges if other[0] == edge[0]] for edge in edges}
    rooms = [a for a, after in doors.items() if len(after) == 2]
    assert len(rooms) == shape.rooms
    assert ends[0] in rooms
    for room in rooms:
        lengths = []
        for node in doors[room]:
            length = 1
            while len(doors.get(node, [])) == 1:
                [node], length = doors[node], length + 1
            lengths.append((length, node in rooms or node == ends[-1]))
        assert sorted(lengths) == [(shape.length, False), (shape.length, True)]


def test_demonstrations_of_a_maze_take_doors_at_random_and_do_everything_at_dead_ends() -> None:
    rng, found = Random(0), []
    for seed in range(300):
        task = maze.draw(4, Random(seed))
        response = maze.demonstrate(task.question, rng)
        found.append((task, response, maze.grade(task.question, task.answer, response)))
    first_doors = [response.startswith(task.answer[:2]) for task, response, _ in found]
    assert 0.4 < sum(first_doors) / 300 < 0.6
    assert 0.2 < sum(solved for *_, solved in found) / 300 < 0.4
    assert any("?" in response for _, response, solved in found if solved)
    wandered = [response for _, response, _ in found if response.count(";") == maze._LONGEST - 1]
    assert 5 < len(wandered) < 60  # cut off
    for task, response, solved in found:
        ended = response[-1] == task.answer[-1]
        assert not solved or ended
        hops = [
            s
            for s in maze.steps(task.question, task.answer, response)
            if s.text not in task.question and s.text.isalpha()
        ]
        assert solved == (ended and not hops)
