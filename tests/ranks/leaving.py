"""A rank whose last exchange ends while it is leaving: ``RANK=… python -m tests.ranks.leaving RECIPE LATE``.

The rank ``LATE`` comes to that exchange, and leaves, seconds after the other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from e3rl.cluster.ranks import join_ranks
from e3rl.config import load_config


def main(recipe: Path, late: int) -> None:
    ranks = join_ranks(load_config(recipe, [], ["train.parallel=ddp"]))
    if ranks.rank == late:
        time.sleep(2)
    # the thread that exchanges is the last to hold the tensor, and needs Python's lock to let go of it: not before Python ends
    sys.setswitchinterval(1000)
    dist.all_reduce(torch.ones(3), async_op=True)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
