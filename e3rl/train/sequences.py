"""Sequences to learn from, and tensors of different length put together.

Tensors about a response are aligned to its first token: position t of a ``_T`` tensor is response token t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from e3rl.types import Group, Trajectory


@dataclass(frozen=True)
class TrainSequence:
    """A trajectory, or an erased candidate behind the prefix it was drawn from (``erased``)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    segments_T: Tensor  # index of the segment each response token lies in
    mask_T: Tensor  # bool: tokens that the loss is about; an erased candidate's prefix is not
    rollout_logprobs_T: Tensor  # as the engine reported them; 0 where mask_T is False
    group: int  # position of its group in the step
    sibling: int
    erased: bool

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def _segment_ids(lengths: Sequence[int], indices: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(indices), torch.tensor(lengths))


def trajectory_sequence(trajectory: Trajectory, group: int) -> TrainSequence:
    """The trajectory as something to learn from."""
    lengths = trajectory.segment_lengths
    return TrainSequence(
        prompt_ids=trajectory.prompt.ids,
        response_ids=tuple(trajectory.ids.tolist()),
        segments_T=_segment_ids(lengths, [s.index for s in trajectory.segments]),
        mask_T=torch.ones(sum(lengths), dtype=torch.bool),
        rollout_logprobs_T=torch.tensor(trajectory.logprobs, dtype=torch.float32),
        group=group,
        sibling=trajectory.sibling,
        erased=False,
    )


def erased_sequences(trajectory: Trajectory, group: int) -> list[TrainSequence]:
    """Every erased candidate, conditioned on the prefix that it was drawn from."""
    sequences = []
    for erasure in trajectory.erasures:
        candidate, size = erasure.candidate, len(erasure.candidate.ids)
        mask_T = torch.arange(erasure.start + size) >= erasure.start
        sequences.append(
            TrainSequence(
                prompt_ids=trajectory.prompt.ids,
                response_ids=(*trajectory.ids[: erasure.start].tolist(), *candidate.ids.tolist()),
                segments_T=torch.where(mask_T, erasure.index, -1),
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


def group_sequences(groups: Sequence[Group], with_erased: bool) -> list[TrainSequence]:
    """All sequences of a step: every group's trajectories, then its erased candidates where they are learnt from."""
    sequences: list[TrainSequence] = []
    for index, group in enumerate(groups):
        sequences += [trajectory_sequence(t, index) for t in group.trajectories]
        if with_erased:
            sequences += [s for t in group.trajectories for s in erased_sequences(t, index)]
    return sequences


def pad(rows: Sequence[Tensor], fill: float | int | bool, device: torch.device) -> Tensor:
    """Rows of different length as one [S, T] tensor, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill).to(device)
