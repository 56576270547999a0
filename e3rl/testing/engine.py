"""The contract of `e3rl.engine.protocol.Engine`, as checks that an engine's author can run.

    contract = EngineContract(make_engine, make_oracle, vocab_size=50, eos_ids=(0,), rows=6, max_length=48)
    check_engine(contract)          # or, in pytest: parametrize over ENGINE_CHECKS, call check(contract)

The oracle is an engine known to be right, over the same model: `e3rl.engine.recompute.RecomputeEngine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.errors import UserError
from e3rl.testing.scripts import EngineContract, assert_same, assert_same_transcript, play, random_script
from e3rl.types import Candidate, Draw


def _one(engine: Engine, row: Row, tokens: int, attempt: int) -> Candidate:
    engine.extend(row, tokens, Draw(1, 2, "p", 3, 4, attempt), Sampling())
    [(delivered, candidate)] = engine.poll()
    assert delivered == row, f"row {row} asked, row {delivered} was delivered"
    return candidate


def check_oracle(contract: EngineContract) -> None:
    """For any sequence of calls, tokens and numbers equal the oracle's."""
    for seed in range(contract.scripts):
        script = random_script(seed, contract.vocab_size)
        expected = play(contract.make_oracle(), script, contract)
        assert_same_transcript(play(contract.make_engine(), script, contract), expected, contract.tolerance)


def check_batch_independence(contract: EngineContract) -> None:
    """A candidate does not depend on what else is generated, nor on the order of requests."""
    prompts = [contract.prompt(n) for n in range(1, contract.rows + 1)]
    draws = [Draw(0, 0, "p", sibling, 0, 0) for sibling in range(contract.rows)]

    def generate(order: Sequence[int]) -> dict[int, Candidate]:
        engine = contract.make_engine()
        number_of = {engine.prefill(prompts[i], 1)[0]: i for i in order}
        for row, i in number_of.items():
            engine.extend(row, 5 + i, draws[i], Sampling())
        candidates: dict[int, Candidate] = {}
        while delivered := engine.poll():
            candidates.update({number_of[row]: candidate for row, candidate in delivered})
        return candidates

    together = generate(range(contract.rows))
    assert len(together) == contract.rows, f"{contract.rows} requests, {len(together)} candidates"
    for i, candidate in generate(range(contract.rows)[::-1]).items():
        assert_same(candidate, together[i], contract.tolerance, f"request {i} in reverse order")
    for i in range(contract.rows):
        assert_same(generate([i])[i], together[i], contract.tolerance, f"request {i} alone")


def check_fresh_draws(contract: EngineContract) -> None:
    """The same draw gives the same candidate; another attempt gives another one."""
    engine = contract.make_engine()
    [row] = engine.prefill(contract.prompt(4), 1)
    candidates = []
    for attempt in (0, 0, 1, 2, 3):
        candidates.append(_one(engine, row, 8, attempt))
        engine.rollback(row, 0)
    assert_same(candidates[1], candidates[0], contract.tolerance, "the same draw again")
    distinct = len({tuple(c.ids.tolist()) for c in candidates[1:]})
    assert distinct >= 3, f"4 attempts gave only {distinct} different candidates: is the attempt part of the draw?"


def check_rollback(contract: EngineContract) -> None:
    """After a rollback the row is as if the dropped tokens had never been generated."""
    plain, erased = contract.make_engine(), contract.make_engine()
    [row_plain], [row_erased] = (engine.prefill(contract.prompt(5), 1) for engine in (plain, erased))
    first = _one(plain, row_plain, 6, 0)
    assert_same(_one(erased, row_erased, 6, 0), first, contract.tolerance, "first candidate")
    for attempt in (1, 2):
        _one(erased, row_erased, 7, attempt)
        erased.rollback(row_erased, len(first.ids))
    kept = len(first.ids) // 2
    again = _one(erased, row_erased, 6, 3)
    assert_same(again, _one(plain, row_plain, 6, 3), contract.tolerance, "the candidate after two erasures")
    for engine, row in ((plain, row_plain), (erased, row_erased)):
        engine.rollback(row, kept)
        assert engine.length(row) == kept, f"rolled back to {kept} tokens, length says {engine.length(row)}"
    expected = _one(plain, row_plain, 6, 4)
    assert_same(_one(erased, row_erased, 6, 4), expected, contract.tolerance, "the candidate from inside an older one")


def check_siblings(contract: EngineContract) -> None:
    """Siblings share a prompt and nothing else."""
    engine, alone = contract.make_engine(), contract.make_engine()
    rows = engine.prefill(contract.prompt(6), 3)
    _one(engine, rows[0], 8, 0)
    engine.release(rows[1])
    [row] = alone.prefill(contract.prompt(6), 1)
    expected = _one(alone, row, 8, 1)
    assert_same(_one(engine, rows[2], 8, 1), expected, contract.tolerance, "a sibling after the others changed")


@contextmanager
def _refused(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if not str(error):
            raise AssertionError(f"{what}: the {kind.__name__} says nothing") from error
        return
    raise AssertionError(f"{what} must raise {kind.__name__}")


def check_misuse(contract: EngineContract) -> None:
    """Invalid calls are refused and change nothing: ValueError for a program's mistake, UserError for a user's."""
    engine = contract.make_engine()
    draw = Draw(0, 0, "p", 0, 0, 0)
    with _refused(UserError, "an empty prompt"):
        engine.prefill((), 1)
    with _refused(UserError, "a prompt that fills a row"):
        engine.prefill(contract.prompt(contract.max_length), 1)
    [row] = engine.prefill(contract.prompt(3), 1)
    with _refused(UserError, "a candidate that can't fit"):
        engine.extend(row, contract.max_length - 2, draw, Sampling())
    with _refused(ValueError, "rolling back beyond the length"):
        engine.rollback(row, 1)
    with _refused(ValueError, "rolling back to a negative length"):
        engine.rollback(row, -1)
    with _refused(ValueError, "a candidate of no tokens"):
        engine.extend(row, 0, draw, Sampling())
    engine.extend(row, 2, draw, Sampling())
    with _refused(ValueError, "a second request for a row"):
        engine.extend(row, 2, draw, Sampling())
    with _refused(ValueError, "rolling back a row with an open request"):
        engine.rollback(row, 0)
    with _refused(ValueError, "new weights while a row is held"):
        engine.load_weights({}, 1)
    assert [r for r, _ in engine.poll()] == [row], "the request was lost"
    engine.release(row)
    for what, act in (
        ("extend", lambda: engine.extend(row, 1, draw, Sampling())),
        ("rollback", lambda: engine.rollback(row, 0)),
        ("release", lambda: engine.release(row)),
        ("length", lambda: engine.length(row)),
    ):
        with _refused(ValueError, f"{what} of a released row"):
            act()
    engine.load_weights({}, 1)


def check_capacity(contract: EngineContract) -> None:
    """Released rows can be used again, and a release cancels an open request."""
    engine = contract.make_engine()
    capacity = engine.free_rows()
    assert capacity >= contract.rows, f"the engine has {capacity} rows, the contract says {contract.rows}"
    with _refused(UserError, "a group larger than the engine"):
        engine.prefill(contract.prompt(2), capacity + 1)
    seen: set[Row] = set()
    for _ in range(3):
        rows = engine.prefill(contract.prompt(2), capacity)
        assert engine.free_rows() == 0, f"all rows are held, and {engine.free_rows()} are free"
        assert not seen & set(rows), "a handle was used twice"
        seen.update(rows)
        with _refused(ValueError, "a row more than there are"):
            engine.prefill(contract.prompt(2), 1)
        for row in rows:
            engine.extend(row, 3, Draw(0, 0, "p", 0, 0, 0), Sampling())
            engine.release(row)
        assert engine.free_rows() == capacity, f"all rows were released, and {engine.free_rows()} are free"
        assert engine.poll() == [], "a cancelled request was delivered"


ENGINE_CHECKS: tuple[Callable[[EngineContract], None], ...] = (
    check_oracle,
    check_batch_independence,
    check_fresh_draws,
    check_rollback,
    check_siblings,
    check_misuse,
    check_capacity,
)


def check_engine(contract: EngineContract) -> None:
    """All checks; the first that fails raises AssertionError with what is wrong."""
    for check in ENGINE_CHECKS:
        check(contract)
