"""Attention of a sequence's last places against the whole matrix, and what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from e3rl.engine.torch import operations
from e3rl.engine.torch.operations import attention_behind
from e3rl.plan.dry_run import Allocations


def _states(queries: int, keys: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, queries, 8), (1, 2, keys, 8), (1, 2, keys, 8))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def _whole(query: Tensor, key: Tensor, value: Tensor, window: int | None, sink: bool) -> Tensor:
    """One number after the other would be slower, a matrix is plain enough."""
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    queries, keys = query.shape[2], key.shape[2]
    scores = query @ key.transpose(2, 3) * 0.3
    unseen = torch.zeros(queries, keys, dtype=torch.bool)
    for q in range(queries):
        for k in range(keys):
            back = keys - queries + q - k
            near = back >= 0 and (window is None or back < window)
            unseen[q, k] = not (near or (sink and k == 0))
    return scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 14), (1, 6), (13, 14)])
@pytest.mark.parametrize("masked", [0, 10**6])
def test_values_and_gradients_are_those_of_the_whole_matrix(
    queries: int, keys: int, window: int | None, sink: bool, masked: int, monkeypatch: pytest.MonkeyPatch
):
    """With masks and without them, in blocks of four queries where there is a window."""
    monkeypatch.setattr(operations, "MASKED", masked)
    monkeypatch.setattr(operations, "_BLOCK", 4)
    if sink and queries == keys:
        keys += 1
    states = _states(queries, keys)
    expected = _whole(*states, window, sink)
    slopes = torch.autograd.grad(expected.square().sum(), states)
    found = attention_behind(*states, window=window, sink=sink, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found.square().sum(), states), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("context", [0, 1])
def test_memory_grows_with_the_places_and_not_with_their_square(
    window: int | None, context: int, monkeypatch: pytest.MonkeyPatch
):
    """Twice the places take twice the bytes, forward and backward, behind a context as well."""
    monkeypatch.setattr(operations, "MASKED", 2**12)
    monkeypatch.setattr(operations, "_BLOCK", 64)
    taken = []
    for size in (512, 1024, 2048):
        states = _states(size, size + context * size // 2)
        with Allocations() as counted:
            before = counted.restart()
            attention_behind(*states, window=window, scale=0.3).sum().backward()
            taken.append(counted.peak - before)
    assert taken[2] / taken[1] == pytest.approx(2, rel=0.1)
    assert taken[2] < 2048 * 4096  # a matrix of scores alone would be four times that
