"""Training sequences, packed into rows without padding in which shared prefixes are computed once.

Tensors about a response are aligned to its first token: position t of a ``_T`` tensor is response token t.

A row is a prefix tree laid flat: siblings share their prompt, an erased candidate the text that it was drawn after.
A sequence brings only the tokens that no earlier one had at the same place (its *branch*) and attends to those it
shares (its *context*), so every number is that of the sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from e3rl.types import Group, Trajectory

if TYPE_CHECKING:
    from e3rl.cluster.context import ContextShare


@dataclass(frozen=True)
class TrainSequence:
    """A trajectory, or an erased candidate behind the prefix it was drawn from (``erased``)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    segments_T: Tensor  # which of the drawn segments each response token lies in; -1: an observation
    mask_T: Tensor  # bool: tokens that the loss is about; an erased candidate's prefix is not
    rollout_logprobs_T: Tensor  # as the engine reported them; 0 where mask_T is False
    group: int  # position of its group in the step
    sibling: int
    erased: bool
    selection_T: Tensor | None = None  # 1/w of the segment each token lies in, where that is corrected for
    unlearnt: bool = False  # cut off at the length limit: its reward counts for its siblings, its tokens in no loss

    @property
    def loss_mask_T(self) -> Tensor:
        """``mask_T`` as the loss has it."""
        return torch.zeros_like(self.mask_T) if self.unlearnt else self.mask_T

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def _segment_ids(lengths: Sequence[int], indices: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(indices), torch.tensor(lengths))


def trajectory_sequence(trajectory: Trajectory, group: int, mask_truncated: bool = False) -> TrainSequence:
    """The trajectory as a training sequence; with ``mask_truncated`` one that was cut off is in no loss."""
    lengths = trajectory.segment_lengths
    indices = [-1 if s.observation else trajectory.drawn_index(s.index) for s in trajectory.segments]
    return TrainSequence(
        prompt_ids=trajectory.prompt.ids,
        response_ids=tuple(trajectory.ids.tolist()),
        segments_T=_segment_ids(lengths, indices),
        mask_T=torch.tensor(trajectory.drawn_T),
        rollout_logprobs_T=torch.tensor(trajectory.logprobs, dtype=torch.float32),
        group=group,
        sibling=trajectory.sibling,
        erased=False,
        unlearnt=mask_truncated and trajectory.finish == "length",
    )


def erased_sequences(trajectory: Trajectory, group: int) -> list[TrainSequence]:
    """Every erased candidate, conditioned on the prefix that it was drawn from."""
    sequences = []
    for place, erasure in enumerate(trajectory.erasures):
        candidate, size = erasure.candidate, len(erasure.candidate.ids)
        mask_T = torch.arange(erasure.start + size) >= erasure.start
        sequences.append(
            TrainSequence(
                prompt_ids=trajectory.prompt.ids,
                response_ids=(*trajectory.context_of(place), *candidate.ids.tolist()),
                segments_T=torch.where(mask_T, trajectory.drawn_index(erasure.index), -1),
                mask_T=mask_T,
                rollout_logprobs_T=torch.cat(
                    [torch.zeros(erasure.start), torch.tensor(candidate.logprobs, dtype=torch.float32)]
                ),
                group=group,
                sibling=trajectory.sibling,
                erased=True,
            )
        )
    return sequences


def group_sequences(
    groups: Sequence[Group], with_erased: bool, mask_truncated: bool = False, first: int = 0
) -> list[TrainSequence]:
    """All sequences of groups: each one's trajectories, then its erased candidates where they are learnt from. ``first`` numbers
    the first group."""
    sequences: list[TrainSequence] = []
    for index, group in enumerate(groups, first):
        sequences += [trajectory_sequence(t, index, mask_truncated) for t in group.trajectories]
        if with_erased:
            sequences += [s for t in group.trajectories for s in erased_sequences(t, index)]
    return sequences


def pad(rows: Sequence[Tensor], fill: float | int | bool, device: torch.device) -> Tensor:
    """Rows of different length as one [S, T] tensor, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill).to(device)


def uncertainties(group: Group, siblings: Sequence[int]) -> Tensor | None:
    """U of the segment that each of these siblings' tokens lies in, [G, T]; -1 in padding and where it was not judged.

    None where one of them was judged nowhere.
    """
    found = list[Tensor]()
    for trajectory in (group.trajectories[s] for s in siblings):
        judgements = [s.judgement for s in trajectory.segments]
        if not any(judgements):
            return None
        values = [-1.0 if j is None else j.uncertainty.total for j in judgements]
        found.append(torch.repeat_interleave(torch.tensor(values), torch.tensor(trajectory.segment_lengths)))
    return pad(found, -1.0, torch.device("cpu"))


@dataclass(frozen=True)
class Branch:
    """New tokens of a sequence, behind a context given as (branch, start, end) ranges within earlier branches."""

    context: tuple[tuple[int, int, int], ...]
    size: int


@dataclass(frozen=True)
class RowPiece:
    """Consecutive tokens of a branch: ``size`` of them, up to its token ``end``, which is left out."""

    branch: int
    end: int
    size: int


class PrefixTree:
    """Tokens by their prefix. A token's position in the row is the order in which it was inserted."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], int] = {}  # (position of the token before, or -1; id) -> position

    def __len__(self) -> int:
        return len(self._places)

    def insert(self, ids: Sequence[int]) -> list[int]:
        """The row positions of a sequence's tokens."""
        path, before, places = [], -1, self._places
        for token in ids:
            before = places.setdefault((before, token), len(places))
            path.append(before)
        return path

    def tokens(self) -> list[tuple[int, int]]:
        """(position of the token before, id) of each token of the row."""
        return list(self._places)


def _ranges(path: Sequence[int], starts: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Row positions as ranges within branches, which begin at ``starts``."""
    found: list[tuple[int, int, int]] = []
    branch = 0
    for position in path:
        while branch + 1 < len(starts) and starts[branch + 1] <= position:
            branch += 1
        inside = position - starts[branch]
        if found and found[-1][0] == branch and found[-1][2] == inside:
            found[-1] = (branch, found[-1][1], inside + 1)
        else:
            found.append((branch, inside, inside + 1))
    return tuple(found)


@dataclass(frozen=True)
class PackedRow:
    """A prefix tree as model input: N tokens, the branches that they lie in, and where each sequence's tokens are."""

    ids_N: Tensor
    positions_N: Tensor  # place in the sequence, for the model's position embedding
    before_N: Tensor  # row position of the token before; -1 at a sequence's first
    scored_K: Tensor  # row positions of response tokens, each once, in order
    branches: tuple[Branch, ...]
    paths: tuple[Tensor, ...]  # row positions of each sequence's tokens, prompt and response; on the CPU
    prompt_lengths: tuple[int, ...]
    erased: tuple[bool, ...]
    routers: bool = False  # a pass with gradients also gives the loss of routers
    share: ContextShare | None = None  # this rank's part, where ranks divide the row

    @classmethod
    def of(cls, sequences: Sequence[TrainSequence], device: torch.device, *, routers: bool = False) -> PackedRow:
        tree, places, scored = PrefixTree(), list[int](), set[int]()
        branches, starts, paths = list[Branch](), list[int](), list[Tensor]()
        for sequence in sequences:
            start = len(tree)
            path = tree.insert(sequence.prompt_ids + sequence.response_ids)
            paths.append(torch.tensor(path))
            scored.update(path[len(sequence.prompt_ids) :])
            size = len(tree) - start
            if size:
                branches.append(Branch(_ranges(path[: len(path) - size], starts), size))
                places += range(len(path) - size, len(path))
                starts.append(start)
        before_N, ids_N = torch.tensor(tree.tokens(), device=device).unbind(-1)
        return cls(
            ids_N,
            torch.tensor(places, device=device),
            before_N,
            torch.tensor(sorted(scored), device=device),
            tuple(branches),
            tuple(paths),
            tuple(len(s.prompt_ids) for s in sequences),
            tuple(s.erased for s in sequences),
            routers,
        )

    def behind_context(self, parts: Sequence[Tensor], index: int, dim: int) -> Tensor:
        """What a branch's tokens and those before them have; ``parts`` are those of the branches, along ``dim``."""
        context = [parts[b].narrow(dim, start, end - start) for b, start, end in self.branches[index].context]
        return torch.cat([*context, parts[index]], dim) if context else parts[index]

    def pieces(self) -> Sequence[RowPiece]:
        """What lies here of the branches: all of each, where ranks don't divide the row."""
        if self.share is not None:
            return self.share.pieces
        return [RowPiece(index, branch.size, branch.size) for index, branch in enumerate(self.branches)]

    def seen_by(self, piece: RowPiece, parts: Sequence[Tensor], dim: int) -> Tensor:
        """What a piece's tokens and those before them have, as in `behind_context`."""
        seen = self.behind_context(parts, piece.branch, dim)
        after = self.branches[piece.branch].size - piece.end
        return seen.narrow(dim, 0, seen.shape[dim] - after) if after else seen

    def response_paths(self) -> list[Tensor]:
        """Row positions of each sequence's response tokens, on the CPU."""
        return [path[size:] for path, size in zip(self.paths, self.prompt_lengths, strict=True)]


def _insert_all(tree: PrefixTree, sequences: Sequence[TrainSequence]) -> int:
    """Insert sequences into a tree; return its number of tokens."""
    for sequence in sequences:
        tree.insert(sequence.prompt_ids + sequence.response_ids)
    return len(tree)


def packed_size(sequences: Sequence[TrainSequence]) -> int:
    """Tokens of the row that these sequences make."""
    return _insert_all(PrefixTree(), sequences)


def plan_rows(parts: Sequence[Sequence[TrainSequence]], token_budget: int, *, whole: bool = False) -> list[list[int]]:
    """Indices of parts, in order, gathered into rows of at most ``token_budget`` tokens; ``whole`` counts what sequences share
    once for each of them.

    A part is never divided; one that is larger than the budget gets a row of its own.
    """
    rows: list[list[int]] = []
    tree, total = PrefixTree(), 0
    for index, part in enumerate(parts):
        size = sum(sequence.length for sequence in part)
        total += size
        if rows and (total if whole else _insert_all(tree, part)) <= token_budget:
            rows[-1].append(index)
        else:
            tree, total = PrefixTree(), size
            _insert_all(tree, part)
            rows.append([index])
    return rows


def packed_rows(
    sequences: Sequence[TrainSequence],
    token_budget: int,
    device: torch.device,
    *,
    whole: bool = False,
    routers: bool = False,
) -> list[PackedRow]:
    """Sequences, in their order, as rows of at most ``token_budget`` tokens, counted as in `plan_rows`."""
    plan = plan_rows([[s] for s in sequences], token_budget, whole=whole)
    return [PackedRow.of([sequences[i] for i in indices], device, routers=routers) for indices in plan]


def recurrent_mixers(model: nn.Module) -> list[nn.Module]:
    """Modules that carry a state from token to token: those with a convolution over tokens directly inside."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and any(isinstance(child, nn.Conv1d) for child in module.children())
    ]


def each_alone(
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    *,
    packed_row: PackedRow | None = None,
    attribution_tap: Any = None,
    **kwargs: Any,
) -> Tensor:
    """A recurrent mixer over a packed row: each branch behind the whole sequence that it goes on from, run from its beginning.

    What sequences share is computed once for each of them here, and only here.
    """
    if packed_row is None:
        raise TypeError("its recurrent layers are not given the row")
    parts = hidden_states.split([branch.size for branch in packed_row.branches], 1)
    found = [
        forward(packed_row.behind_context(parts, index, 1), **kwargs)[:, -branch.size :]
        for index, branch in enumerate(packed_row.branches)
    ]
    return torch.cat(found, 1)
