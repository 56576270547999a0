"""The driver's own surface: groups of several askers on one engine, admitted in order, cancelled, and failing alone."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from e3rl.engine.protocol import Row
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.rollout.driver import Driver
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.jobs import GroupJob
from e3rl.rollout.orders import Committed, Event, Finished
from e3rl.testing.scripted import ScriptedEngine
from e3rl.types import Candidate, Draw, Group
from tests.rollout.worlds import ALONE, MEAN_ONLY, PLAIN_GROUP, levels, prompt, roll, rollout

SETTINGS = GroupSettings(rollout(), MEAN_ONLY, seed=7, step=3, policy_version=5)
SCRIPT = levels({("p", 0, 0, 0): 2.0, ("q", 1, 1, 0): 2.0}, ends=[("r", 0, 0, 0), ("r", 1, 0, 0)])


def drive(driver: Driver) -> dict[GroupJob, int]:
    """Step until nothing is left; the groups that ended, and at which step."""
    ended: dict[GroupJob, int] = {}
    for number in range(1000):
        if not driver.busy:
            return ended
        found = driver.step()
        assert len({*ended, *found}) == len(ended) + len(found), "each ends once"
        ended |= dict.fromkeys(found, number)
    raise AssertionError("it never ends")


def alone(name: str, settings: GroupSettings = SETTINGS) -> Group:
    driver = Driver(ScriptedEngine(SCRIPT))
    job = driver.submit(prompt(name), settings)
    drive(driver)
    return job.result()


def test_groups_of_different_settings_decode_together_and_are_what_each_is_alone():
    other = replace(SETTINGS, rollout=rollout(num_generations=3, max_segments=2), erasure=PLAIN_GROUP)
    engine = ScriptedEngine(SCRIPT, cache_rows=5)
    driver = Driver(engine)
    jobs = [driver.submit(prompt("p"), SETTINGS), driver.submit(prompt("q"), other)]
    assert (driver.waiting, driver.decoding, engine.calls) == (2, 0, []), "submit asks nothing of the engine"
    driver.step()
    assert (driver.waiting, driver.decoding) == (0, 2)
    drive(driver)
    assert [job.result() for job in jobs] == [alone("p"), alone("q", other)]
    assert engine.held == 0


def test_a_group_that_waits_for_rows_is_not_overtaken_by_a_smaller_one():
    engine = ScriptedEngine(SCRIPT, cache_rows=5)
    driver = Driver(engine)
    large, single = (replace(SETTINGS, rollout=rollout(num_generations=n)) for n in (4, 1))
    first = driver.submit(prompt("p"), SETTINGS)
    driver.submit(prompt("q"), large)
    driver.submit(prompt("s"), single)
    driver.step()
    assert (driver.decoding, driver.waiting) == (1, 2)
    assert not driver.room(1), "the free rows are spoken for"
    assert next(iter(drive(driver))) is first
    assert [c.tick for c in engine.made("prefill") if c.row >= 2] == [8] * 5, "both start when the first has ended"


ONE = replace(SETTINGS, rollout=rollout(num_generations=1))


def test_a_client_with_many_groups_does_not_keep_another_waiting():
    """Sixty groups stand in the queue when one of another client comes: it is the first that gets a freed row."""
    driver = Driver(ScriptedEngine(SCRIPT, cache_rows=4))
    many = [driver.submit(prompt(f"a{i}"), ONE, client=("many",)) for i in range(60)]
    driver.step()
    one = driver.submit(prompt("b"), ONE, client=("one",))
    ended = list(drive(driver))
    assert ended.index(one) < 8, "the four that had rows, and at most those that began with it"
    assert [job for job in ended if job is not one] == many, "within a client the order is that of asking"


def test_clients_with_much_to_do_have_the_same_rows():
    engine = ScriptedEngine(SCRIPT, cache_rows=6)
    driver = Driver(engine)
    jobs = [driver.submit(prompt(f"{name}{i}"), ONE, client=(name,)) for name in "abc" for i in range(10)]
    held = []
    while driver.waiting:
        ended = driver.step()
        held.append([sum(bool(j.rows.held) for j in jobs if j.client == (name,)) for name in "abc"])
        assert not any(job.error for job in ended)
    assert held[0] == [2, 2, 2]
    assert max(max(h) - min(h) for h in held[:-3]) <= 1


def test_a_large_group_is_not_starved_by_another_clients_small_ones():
    """It is next while its client has the fewest rows, and then the rows that become free are kept for it."""
    engine = ScriptedEngine(SCRIPT, cache_rows=4)
    driver = Driver(engine)
    for i in range(4):
        driver.submit(prompt(f"a{i}"), ONE, client=("small",))
    driver.step()
    large = driver.submit(prompt("b"), replace(SETTINGS, rollout=rollout(num_generations=4)), client=("large",))
    begun = 0
    while not large.rows.held:
        driver.submit(prompt(f"c{begun}"), ONE, client=("small",))
        driver.step()
        begun += 1
        assert begun < 20
    assert engine.held == 4


def test_a_new_name_for_every_group_gives_nobody_more_rows():
    """One client takes another key and user each time; the other, at another address, has as many rows and is not starved."""
    driver = Driver(ScriptedEngine(SCRIPT, cache_rows=4))
    for i in range(40):
        driver.submit(prompt(f"a{i}"), ONE, client=("bad", f"key{i}", f"user{i}"))
    own = [driver.submit(prompt(f"b{i}"), ONE, client=("good", "", "")) for i in range(10)]
    ended = list(drive(driver))
    assert max(ended.index(job) for job in own) < 22


def test_keys_of_one_address_have_the_same_rows_and_users_of_one_key():
    driver = Driver(ScriptedEngine(SCRIPT, cache_rows=8))
    names = [("a", "k", "u"), ("a", "k", "v"), ("a", "l", ""), ("b", "", "")]
    jobs = [driver.submit(prompt(f"{name}{i}"), ONE, client=name) for name in names for i in range(8)]
    driver.step()
    assert [sum(bool(job.rows.held) for job in jobs if job.client == name) for name in names] == [1, 1, 2, 4]


def test_cancelling_gives_the_rows_to_whoever_waits():
    engine = ScriptedEngine(SCRIPT, cache_rows=2)
    driver = Driver(engine)
    first, second, third = (driver.submit(prompt(name), SETTINGS) for name in "pqs")
    driver.step()
    driver.cancel(first)
    driver.cancel(second)
    assert (engine.held, driver.decoding, driver.waiting) == (0, 0, 1)
    assert list(drive(driver)) == [third]
    assert third.result() == alone("s")
    driver.cancel(third)  # it has ended: nothing happens
    assert engine.held == 0


class NonFinite(ScriptedEngine):
    """Raises for one draw, as long as it is open."""

    broken: Draw | None = None

    def poll(self) -> list[tuple[Row, Candidate]]:
        if self.broken is not None and any(self._request(row).draw is self.broken for row in self._open):
            raise NonFiniteLogits(self.broken)
        return super().poll()


@pytest.mark.parametrize("same_seed", [False, True])
def test_non_finite_logits_fail_the_group_that_they_belong_to(same_seed: bool):
    """With the same seed and the same name, two groups have equal draws: the very object tells them apart."""
    engine, healthy = NonFinite(SCRIPT), replace(SETTINGS, seed=7 if same_seed else 8)
    driver = Driver(engine)
    jobs = [driver.submit(prompt("p"), settings) for settings in (healthy, SETTINGS)]
    driver.step()
    engine.broken = next(draw for job, _, draw in driver._open.values() if job is jobs[1])
    drive(driver)
    with pytest.raises(NonFiniteLogits, match="prompt 'p', sibling 0"):
        jobs[1].result()
    assert jobs[0].result() == alone("p", healthy)
    assert engine.held == 0


def test_each_failure_is_its_own_groups():
    """Settings that can't be used, a prompt that doesn't fit, an observer that raises: three groups fail, one is made."""

    class Picky(ScriptedEngine):
        def prefill(self, prompt_ids, siblings):
            if len(prompt_ids) > 3:
                raise UserError("too long")
            return super().prefill(prompt_ids, siblings)

    def raising(event: Event) -> None:
        if isinstance(event, Committed) and event.segment.index == 1:
            raise ZeroDivisionError

    driver = Driver(engine := Picky(SCRIPT))
    good = driver.submit(prompt("q"), SETTINGS)
    unjudged = driver.submit(prompt("a"), replace(SETTINGS, rollout=ALONE, erasure=PLAIN_GROUP))
    long = driver.submit(replace(prompt("b"), ids=(1, 2, 3, 4)), SETTINGS)
    watched = driver.submit(prompt("c"), replace(SETTINGS, rollout=rollout(erase=False)), raising)
    drive(driver)
    assert [type(job.error) for job in (good, unjudged, long, watched)] == [
        type(None), UserError, UserError, ZeroDivisionError,
    ]  # fmt: skip
    assert good.result() == alone("q")
    assert engine.held == 0


def test_an_engine_that_fails_fails_what_it_was_decoding_and_not_what_waits():
    class Once(ScriptedEngine):
        failed = False

        def poll(self):
            if not self.failed:
                self.failed = True
                raise MemoryError
            return super().poll()

    driver = Driver(engine := Once(SCRIPT, cache_rows=2))
    first, second = (driver.submit(prompt(name), SETTINGS) for name in "pq")
    drive(driver)
    assert isinstance(first.error, MemoryError)
    assert second.result() == alone("q")
    assert engine.held == 0


def test_a_row_that_the_engine_can_not_give_back_is_its_groups_failure():
    class Keeping(ScriptedEngine):
        def release(self, row: Row) -> None:
            super().release(row)
            if row == 0:
                raise OSError("busy")

    driver = Driver(Keeping(SCRIPT))
    first, second = (driver.submit(prompt(name), SETTINGS) for name in "pq")
    drive(driver)
    assert isinstance(first.error, OSError)
    assert second.result() == alone("q")


class Remembering(dict[Draw, deque[Candidate]]):
    """A memory that keeps everything, for another life."""

    def take(self, draw: Draw) -> Candidate | None:
        waiting = self.get(draw)
        return waiting.popleft() if waiting else None

    def add(self, draw: Draw, candidate: Candidate) -> None:
        self.setdefault(draw, deque()).append(candidate)

    def flush(self) -> None:
        """Nothing is held back."""


def test_a_group_that_is_remembered_whole_takes_no_row():
    memory = Remembering()
    first = Driver(ScriptedEngine(SCRIPT), memory)
    job = first.submit(prompt("p"), SETTINGS)
    drive(first)
    told: list[Event] = []
    second = Driver(engine := ScriptedEngine(SCRIPT), memory)
    again = second.submit(prompt("p"), SETTINGS, told.append)
    assert second.busy
    assert second.step() == [again]
    assert again.result() == job.result()
    assert told[-1] == Finished(job.result())
    assert engine.calls == []


def test_what_is_remembered_in_part_is_gone_on_from_and_only_for_unfinished_siblings():
    memory = Remembering()
    whole, script = roll(levels({}, ends=[("p", 0, 0, 0)]))
    first = Driver(ScriptedEngine(levels({}, ends=[("p", 0, 0, 0)])), memory)
    first.submit(prompt("p"), SETTINGS)
    first.step()  # sibling 0 ends, sibling 1 has its first segment
    first.close()

    class Appending(ScriptedEngine):
        def append(self, row: Row, ids: list[int]) -> None:
            self._idle(row).ids += ids

    second = Driver(engine := Appending(levels({}, ends=[("p", 0, 0, 0)])), memory)
    job = second.submit(prompt("p"), SETTINGS)
    drive(second)
    assert job.result() == whole["p"]
    assert len(engine.made("prefill")) == 1
    assert [c.draw.segment for c in engine.made("deliver") if c.draw] == [1, 2]
    assert script.held == 0
