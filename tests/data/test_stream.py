"""The order of prompts: whole epochs, fresh permutations, and the same whatever interrupts it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.data.stream import PromptStream, epoch_order
from e3rl.errors import UserError
from e3rl.types import Problem, Prompt


def prompts(n: int) -> list[Prompt]:
    return [Prompt(Problem(f"p{i}", f"question {i}"), (i, i + 1)) for i in range(n)]


def ids(taken: list[Prompt]) -> list[str]:
    return [p.problem.id for p in taken]


def test_the_order_is_pinned() -> None:
    """A checkpoint outlives releases: these permutations must never change."""
    assert epoch_order(8, seed=0, epoch=0) == [7, 0, 1, 5, 3, 4, 2, 6]
    assert epoch_order(8, seed=0, epoch=1) == [5, 7, 6, 1, 0, 2, 4, 3]
    assert epoch_order(8, seed=1, epoch=0) == [5, 3, 7, 0, 4, 2, 6, 1]


def test_each_epoch_holds_every_prompt_once_in_a_fresh_order() -> None:
    stream = PromptStream(prompts(20), seed=3)
    epochs = [ids(stream.take(20)) for _ in range(4)]
    assert all(sorted(e) == sorted(epochs[0]) and len(set(e)) == 20 for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert stream.epochs == 4


def test_what_does_not_fill_a_step_is_left_to_the_next_epoch() -> None:
    stream = PromptStream(prompts(8), seed=0)
    first, second = epoch_order(8, seed=0, epoch=0), epoch_order(8, seed=0, epoch=1)
    taken = [ids(stream.take(3)) for _ in range(4)]
    expected = [first[:3], first[3:6], second[:3], second[3:6]]
    assert taken == [[f"p{i}" for i in step] for step in expected]
    assert stream.epochs == 1.75


def test_a_step_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="a step of 4 different prompts can't be made of 3"):
        PromptStream(prompts(3), seed=0).take(4)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(4, 12),
    seed=st.integers(0, 2**40),
    takes=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    cut=st.integers(0, 8),
)
def test_an_interruption_does_not_change_the_order(size: int, seed: int, takes: list[int], cut: int) -> None:
    whole, stream = PromptStream(prompts(size), seed), PromptStream(prompts(size), seed)
    for number, n in enumerate(takes):
        if number == cut:
            state = json.loads(json.dumps(stream.state()))
            stream = PromptStream(prompts(size), seed=999)
            stream.restore(state)
        taken = ids(stream.take(n))
        assert taken == ids(whole.take(n))
        assert len(set(taken)) == n


def test_going_back() -> None:
    stream = PromptStream(prompts(5), seed=1)
    stream.take(3)
    state = stream.state()
    first = ids(stream.take(4))
    stream.restore(state)
    assert ids(stream.take(4)) == first


def test_changed_data_is_refused() -> None:
    state = PromptStream(prompts(5), seed=1).state()
    for other in (prompts(6), [*prompts(4), Prompt(Problem("p4", "other"), (9,))]):
        with pytest.raises(UserError, match="the training data changed since the checkpoint"):
            PromptStream(other, seed=1).restore(state)


@pytest.mark.parametrize("damage", [{"epoch": -1}, {"position": 6}, {"position": "0"}, {"seed": None}, {"epoch": True}])
def test_damaged_state_is_refused(damage: dict[str, object]) -> None:
    stream = PromptStream(prompts(5), seed=1)
    with pytest.raises(UserError, match="damaged"):
        stream.restore({**stream.state(), **damage})


def test_no_prompts() -> None:
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], seed=0)
