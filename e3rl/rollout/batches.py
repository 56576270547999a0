"""Batches of groups on one engine: prompts are taken as rows become free, groups come as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from e3rl.engine.protocol import Engine
from e3rl.errors import UserError
from e3rl.rollout.driver import Driver, Observer
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.jobs import GroupJob
from e3rl.rollout.turns import Memory
from e3rl.types import Group, Prompt


def run_groups(
    engine: Engine,
    prompts: Iterable[Prompt],
    settings: GroupSettings,
    *,
    observe: Observer | None = None,
    memory: Memory | None = None,
) -> Iterator[Group]:
    """Yield each prompt's group as it finishes; prompts are taken as rows become free. The settings are checked at once.

    Every row is released when the iterator ends, whether exhausted, closed early or stopped by an error.
    """
    settings.check()
    jobs = run_jobs(engine, ((p, settings) for p in prompts), settings.rollout.num_generations, observe, memory)
    return (job.result() for job in jobs)


def run_jobs(
    engine: Engine,
    wanted: Iterable[tuple[Prompt, GroupSettings]],
    rows: int,
    observe: Observer | None = None,
    memory: Memory | None = None,
    between: Callable[[Driver], list[GroupJob]] | None = None,
) -> Iterator[GroupJob]:
    """`run_groups` for groups with settings of their own, none of more than ``rows`` samples.

    ``between`` is called before each step of the driver, which it may park, and returns the groups that ended with that.
    """
    seen: set[tuple[str, int]] = set()
    driver, left = Driver(engine, memory), iter(wanted)

    def feed() -> None:
        while driver.room(rows) and (following := next(left, None)) is not None:
            prompt, settings = following
            name = (prompt.problem.id, settings.first_sibling)
            if name in seen:
                raise UserError(
                    f"problem id '{prompt.problem.id}' occurs twice in one batch of rollouts: both groups would get "
                    "the same random draws and be identical. Give every problem its own id (data.id_column)"
                )
            seen.add(name)
            driver.submit(prompt, settings, observe)

    try:
        feed()
        while driver.busy:
            ended = (between(driver) if between else []) + driver.step()
            for job in ended:
                job.result()
            feed()
            yield from ended
    finally:
        driver.close()
