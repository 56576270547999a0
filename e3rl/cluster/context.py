"""Context parallelism: the tokens of a packed row divided among neighbouring ranks.

Each rank runs the model on its own tokens, so what a pass keeps is divided too. In attention its queries meet the keys and
values of the whole row, which are brought together layer by layer; their gradients go back to the ranks that made them. Every
rank ends with all log-probabilities, makes the same loss of them, and has its tokens' part of the gradients, which add up.

A row is cut into twice as many equal chunks as there are ranks; a rank has one of the first half and its mirror image of the
second, since late tokens have more to attend to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from e3rl.cluster.ranks import Ranks
from e3rl.train.packing import Branch, PackedRow, RowPiece


class _Gathered(torch.autograd.Function):
    """Keys or values [1, H, n, dim] of this rank's tokens to those of the row, [1, H, N, dim]."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
        with ranks.guard():
            dist.all_gather(parts, mine.contiguous(), group=ranks.group)
        first, second = zip(*(part.chunk(2, 2) for part in parts), strict=True)
        return torch.cat([*first, *reversed(second)], 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        chunks, ranks = gradients[0].chunk(2 * ctx.ranks.world, 2), ctx.ranks
        of_ranks = [torch.cat([chunks[r], chunks[-1 - r]], 2) for r in range(ranks.world)]
        mine = torch.empty_like(of_ranks[0])
        with ranks.guard():
            dist.reduce_scatter(mine, of_ranks, group=ranks.group)
        return mine, None


class _Together(torch.autograd.Function):
    """The sum over ranks. All make the same loss of it, so each one's gradient is that of its own part."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks) -> Tensor:
        return _added(mine, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0], None


def _added(mine: Tensor, ranks: Ranks) -> Tensor:
    total = mine.clone()
    with ranks.guard():
        dist.all_reduce(total, group=ranks.group)
    return total


@dataclass(frozen=True)
class ContextShare:
    """A rank's part of a row: n of its N tokens."""

    ranks: Ranks  # among which the row is divided
    mine_n: Tensor  # row positions
    places_N: Tensor  # of the row's tokens among these; -1: another rank's. On the CPU
    pieces: tuple[RowPiece, ...]  # of branches, in the order of ``mine_n``
    scored_k: Tensor  # row positions of response tokens that are predicted here
    before_k: Tensor  # and the place of the token before each, among mine

    def whole(self, states: Tensor) -> Tensor:
        """Keys or values of the whole row."""
        found: Tensor = _Gathered.apply(states, self.ranks)  # type: ignore[no-untyped-call]
        return found

    def together(self, values_N: Tensor) -> Tensor:
        """The sum over ranks of numbers that are 0 where they are another rank's."""
        found: Tensor = _Together.apply(values_N, self.ranks)  # type: ignore[no-untyped-call]
        return found


def _pieces(branches: Sequence[Branch], start: int, end: int) -> list[RowPiece]:
    """The row positions from ``start`` to ``end`` as pieces of branches."""
    found, begin = list[RowPiece](), 0
    for index, branch in enumerate(branches):
        first, last = max(start, begin), min(end, begin + branch.size)
        if first < last:
            found.append(RowPiece(index, last - begin, last - first))
        begin += branch.size
    return found


def divided(row: PackedRow, ranks: Ranks) -> PackedRow:
    """The row with this rank's share of it, made longer by a few tokens of no sequence where it can't be cut evenly."""
    chunks = 2 * ranks.world
    extra, device = -len(row.ids_N) % chunks, row.ids_N.device
    ids_N, positions_N = (torch.nn.functional.pad(x_N, (0, extra)) for x_N in (row.ids_N, row.positions_N))
    branches = (*row.branches, Branch((), extra)) if extra else row.branches
    size = len(ids_N) // chunks
    ranges = [(c * size, (c + 1) * size) for c in (ranks.rank, chunks - 1 - ranks.rank)]
    mine_n = torch.cat([torch.arange(*each) for each in ranges])
    places_N = torch.full((len(ids_N),), -1).index_copy(0, mine_n, torch.arange(len(mine_n)))
    scored_K = row.scored_K.cpu()
    before_K = places_N[row.before_N.cpu()[scored_K]]
    here_K = before_K >= 0
    share = ContextShare(
        ranks,
        mine_n.to(device),
        places_N,
        tuple(piece for each in ranges for piece in _pieces(branches, *each)),
        scored_K[here_K].to(device),
        before_K[here_K].to(device),
    )
    return replace(row, ids_N=ids_N, positions_N=positions_N, branches=branches, share=share)
