"""What ranks on Ray do in tests: train and say who they are, or fail in a chosen way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e3rl.cli.train import train_rank
from e3rl.cluster.training_worker import Begin
from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.train.listeners import Listener

OnStop = Callable[[Callable[[], None]], None]


def train_and_say_who(
    config: Config, place: Path, begin: Begin, listener: Listener, on_stop: OnStop
) -> tuple[Path, Mapping[str, Any]]:
    """`train_rank`, with the process's number in a file named by its rank."""
    (place / f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    return train_rank(config, begin, listener, on_stop)


def die(begin: Begin, listener: Listener, on_stop: OnStop) -> tuple[Path, Mapping[str, Any]]:
    """The second rank's process ends; the first waits for it."""
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(600)
    return Path(), {}


def refuse(begin: Begin, listener: Listener, on_stop: OnStop) -> tuple[Path, Mapping[str, Any]]:
    """The second rank finds something that a person can put right; the first waits for it."""
    if os.environ["RANK"] == "1":
        raise UserError("the cup is empty: fill it")
    time.sleep(600)
    return Path(), {}
