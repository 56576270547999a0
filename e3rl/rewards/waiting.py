"""Asynchronous reward functions, called from ordinary code.

One event loop for the life of the process, in a thread of its own: clients that a user's module keeps between calls are
bound to the loop that made them, and a caller may already be inside a loop, as in a notebook.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Sequence
from typing import Any


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="e3rl-async-rewards", daemon=True).start()
    return loop


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def wait_for_all(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Run them together; each one's result, or the exception that it raised."""
    future = asyncio.run_coroutine_threadsafe(_gather(awaitables), _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C while waiting: nothing may run on behind the caller's back
        future.cancel()
        raise
