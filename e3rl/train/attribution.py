"""Attention over a packed row, how much the end of a response attends to each of its tokens, and the loss of routers.

Registered with the attention registry of transformers, so it serves every model that goes through it. Each branch of
the row attends to its context and causally to itself, in plain scaled-dot-product attention; beside it, softmax rows
are computed for the last L' response positions of each trajectory alone: no T x T matrix exists.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from e3rl.engine.torch.cache import RECURRENT
from e3rl.engine.torch.operations import attention_behind
from e3rl.equations.attribution import attention_shares, token_attribution
from e3rl.errors import UserError
from e3rl.models import unwrapped
from e3rl.objectives.base import AttributionOptions, Objective
from e3rl.train.packing import PackedRow, each_alone, pad, recurrent_mixers

ATTENTION_NAME = "e3rl_packed"
_PAIRS = 2**19  # of queries and keys that shares are computed of at once: 64 MiB with 32 heads


@dataclass(frozen=True)
class _Ends:
    """The last L' response tokens (Q) of a batch of trajectories, and all positions that they attend to (K)."""

    members: tuple[int, ...]  # which sequences of the row
    queries_SQ: Tensor  # places among this rank's tokens, from the last one backwards
    keys_SK: Tensor  # row positions
    places_SQ: Tensor  # of the queries in their sequence
    weights_SQ: Tensor  # 1 / number of queries; 0 where a response has fewer, and for another rank's
    response_SK: Tensor  # which keys are response tokens
    _biases: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, row: PackedRow, members: Sequence[int], window: int) -> _Ends:
        device, cpu = row.ids_N.device, torch.device("cpu")
        keys_SK = pad([row.paths[i] for i in members], 0, cpu)
        lengths_S1 = torch.tensor([[len(row.paths[i])] for i in members])
        prompts_S1 = torch.tensor([[row.prompt_lengths[i]] for i in members])
        sizes_S1 = (lengths_S1 - prompts_S1).clamp(max=window)
        back_Q = torch.arange(int(sizes_S1.max()))
        places_SQ = (lengths_S1 - 1 - back_Q).clamp(min=0)
        place_K = torch.arange(keys_SK.shape[1])
        queries_SQ, weights_SQ = keys_SK.gather(1, places_SQ), (back_Q < sizes_S1) / sizes_S1
        if row.share is not None:  # the others' queries count there
            queries_SQ = row.share.places_N[queries_SQ]
            weights_SQ, queries_SQ = weights_SQ.where(queries_SQ >= 0, 0.0), queries_SQ.clamp(min=0)
        return cls(
            tuple(members),
            queries_SQ.to(device),
            keys_SK.to(device),
            places_SQ.to(device),
            weights_SQ.to(device),
            ((place_K >= prompts_S1) & (place_K < lengths_S1)).to(device),
        )

    def bias(self, window: int | None) -> Tensor:
        """0 where a query sees a key, -inf where it does not, [S, Q, K]. Made once for each kind of layer."""
        if window not in self._biases:
            back_SQK = self.places_SQ[..., None] - torch.arange(self.keys_SK.shape[1], device=self.keys_SK.device)
            unseen_SQK = back_SQK < 0 if window is None else (back_SQK < 0) | (back_SQK >= window)
            zeros_SQK = torch.zeros(unseen_SQK.shape, device=self.keys_SK.device)
            self._biases[window] = zeros_SQK.masked_fill_(unseen_SQK, -torch.inf)
        return self._biases[window]

    def attention(
        self, query: Tensor, key: Tensor, scaling: float, window: int | None, sinks_H: Tensor | None = None
    ) -> Tensor:
        """[S, K]: what each token receives in one layer, a mean over queries and heads; not what sinks receive."""
        heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
        (size, queries), keys = self.queries_SQ.shape, self.keys_SK.shape[1]
        rows = query[0].transpose(0, 1).index_select(0, self.queries_SQ.flatten()).float() * scaling
        rows = rows.view(size, queries, kv_heads, -1, width).permute(0, 2, 3, 1, 4).reshape(size, kv_heads, -1, width)
        seen = key[0].transpose(0, 1).index_select(0, self.keys_SK.flatten()).float()
        scores = rows @ seen.view(size, keys, kv_heads, width).permute(0, 2, 3, 1)
        scores = scores.view(size, heads, queries, keys).add_(self.bias(window)[:, None])
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H.float().view(-1, 1, 1).expand(size, -1, queries, 1)], -1)
        return token_attribution(scores, self.weights_SQ)[:, :keys]


def _together(row: PackedRow, window: int) -> list[list[int]]:
    """The row's trajectories in batches of at most _PAIRS queries times keys, each padded to its longest."""
    batches: list[list[int]] = []
    queries = keys = 0
    for index in (i for i, erased in enumerate(row.erased) if not erased):
        length = len(row.paths[index])
        wider = max(queries, min(window, length - row.prompt_lengths[index])), max(keys, length)
        if batches and (len(batches[-1]) + 1) * math.prod(wider) <= _PAIRS:
            batches[-1].append(index)
            queries, keys = wider
        else:
            batches.append([index])
            queries, keys = min(window, length - row.prompt_lengths[index]), length
    return batches


class AttributionTap:
    """Collects eq 19's a_t of a row's trajectories during one forward pass. ``window`` is L'."""

    def __init__(self, row: PackedRow, window: int, layers: frozenset[int]) -> None:
        self._row, self._layers = row, layers
        self._ends = [_Ends.of(row, members, window) for members in _together(row, window)]
        self._sums: list[Tensor] = [ends.response_SK.float() * 0.0 for ends in self._ends]
        self._seen: set[int] = set()
        self._closed = False

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        scaling: float,
        window: int | None,
        sinks_H: Tensor | None = None,
    ) -> None:
        """Add one layer: ``query`` [1, heads, N, d], ``key`` [1, kv heads, N, d], both already rotated.

        A query sees ``window`` tokens, itself included; None: all up to itself.
        """
        if layer in self._layers and not self._closed:
            self._seen.add(layer)
            for ends, sum_SK in zip(self._ends, self._sums, strict=True):
                sum_SK += ends.attention(query, key, scaling, window, sinks_H)

    def attribution(self) -> list[Tensor | None]:
        """a_t of every response token, a mean over queries, heads and layers; None for erased candidates."""
        return self._by_sequence([sum_SK / len(self._layers) for sum_SK in self._totals()])

    def shares(self) -> list[Tensor | None]:
        """a_t of each trajectory, made to add up to 1. Layers that a backward pass runs again are no longer observed."""
        self._closed = True
        return self._by_sequence(
            [attention_shares(s, e.response_SK) for s, e in zip(self._totals(), self._ends, strict=True)]
        )

    def _totals(self) -> Sequence[Tensor]:
        """The sums over layers, of all ranks' queries. UserError where none of the layers attended under its number."""
        if self._layers.isdisjoint(self._seen):
            raise UserError(
                f"the model's layers {', '.join(map(str, sorted(self._layers)))} gave no attention to divide rewards by: choose "
                "objective.allocation = 'sequence', which leaves them undivided, or another objective"
            )
        share = self._row.share
        return self._sums if share is None else [share.together(sum_SK) for sum_SK in self._sums]

    def _by_sequence(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        found: dict[int, Tensor] = {}
        for ends, values_SK in zip(self._ends, values, strict=True):
            found |= zip(ends.members, values_SK, strict=True)
        ranges = zip(self._row.prompt_lengths, self._row.paths, strict=True)
        return [found[i][start : len(path)] if i in found else None for i, (start, path) in enumerate(ranges)]


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks_H: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Queries, keys and values eight wider: a key that is 1 at the first new place, 0 elsewhere, scores each head's sink."""
    columns_1H11 = (sinks_H.to(query.dtype) / scale).view(1, -1, 1, 1)
    wider = torch.cat([query, columns_1H11.expand(*query.shape[:3], 1)], -1)
    return nn.functional.pad(wider, (0, 7)), nn.functional.pad(key, (0, 8)), nn.functional.pad(value, (0, 8))


def _before(sink_D: Tensor, states: Tensor) -> Tensor:
    """Keys (or values) with a sink's in front."""
    return torch.cat([sink_D.expand(1, states.shape[1], 1, -1), states], 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_row: PackedRow,
    attribution_tap: AttributionTap | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of every branch. Split, not indexed: its gradient is a concatenation. ``s_aux``: sinks, a logit a head."""
    if softcap is not None:
        raise TypeError("it caps its scores")
    if packed_row.share is not None:
        key, value = packed_row.share.whole(key), packed_row.share.whole(value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width, value_width = query.shape[-1], value.shape[-1]
    if attribution_tap is not None:
        attribution_tap.observe(module.layer_idx, query, key, scale, sliding_window, s_aux)  # type: ignore[arg-type]
    if s_aux is not None:
        query, key, value = _with_sinks(query, key, value, s_aux, scale)
        scaling = scale  # that of the narrower queries
        sink_D = nn.functional.one_hot(torch.tensor(width, device=key.device), key.shape[3]).to(key.dtype)
    sizes, pieces = [branch.size for branch in packed_row.branches], packed_row.pieces()
    keys, values = (states.split(sizes, 2) for states in (key, value))
    outputs = []
    for piece, piece_query in zip(pieces, query.split([piece.size for piece in pieces], 2), strict=True):
        seen_key, seen_value = (packed_row.seen_by(piece, states, 2) for states in (keys, values))
        if s_aux is not None:
            seen_key, seen_value = _before(sink_D, seen_key), _before(torch.zeros_like(sink_D), seen_value)
        outputs.append(
            attention_behind(
                piece_query,
                seen_key,
                seen_value,
                window=sliding_window,
                sink=s_aux is not None,
                scale=scaling,
                dropout=dropout,
            )
        )
    return torch.cat(outputs, 2)[..., :value_width].transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: branches have their own."""


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def attribution_layers(model: nn.Module, which: str) -> frozenset[int]:
    """The layers averaged over, by `attribution_layers`: 'last' or 'all' of those that attend. UserError where none does."""
    config = unwrapped(model).config.get_text_config(decoder=True)
    count: int = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    attending = [layer for layer, kind in enumerate(kinds[:count]) if kind not in (*RECURRENT, "moe", "mlp")]
    if not attending:
        raise UserError(
            f"{type(unwrapped(model)).__name__} has no attention layers, and this objective divides rewards by attention: "
            "choose objective.allocation = 'sequence', which leaves them undivided, or another objective"
        )
    return frozenset(attending[-1:] if which == "last" else attending)


@dataclass(frozen=True)
class AttributionSettings:
    """L' and the layers of eq 19."""

    window: int
    layers: frozenset[int]

    @classmethod
    def of(cls, objective: Objective, model: nn.Module) -> AttributionSettings | None:
        """An objective's; None where it needs no shares."""
        if "shares" not in objective.needs:
            return None
        options = cast(AttributionOptions, objective)
        return cls(options.attribution_window, attribution_layers(model, options.attribution_layers))


def router_loss(model: Any) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """From router logits by layer to the load-balancing loss that the architecture defines, without a weight. UserError where
    there is none."""
    base = unwrapped(model)
    balance = getattr(sys.modules[type(base).__module__], "load_balancing_loss_func", None)
    if balance is None or not hasattr(base, "num_experts"):
        raise UserError(
            f"train.router_loss: {type(base).__name__} defines no loss of routers; leave it at 0 (models without experts, and "
            "those that balance them in another way, as DeepSeek-V3 does, need none)"
        )
    return lambda logits: balance(logits, base.num_experts, base.num_experts_per_tok)


@contextlib.contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model takes packed rows; backward passes that recompute belong inside as well."""
    config = unwrapped(model).config
    before = config._attn_implementation
    if before == ATTENTION_NAME:
        yield
        return
    config._attn_implementation = ATTENTION_NAME
    mixers: list[Any] = recurrent_mixers(model)
    for mixer in mixers:
        mixer.forward = functools.partial(each_alone, mixer.forward)
    try:
        yield
    finally:
        config._attn_implementation = before
        for mixer in mixers:
            del mixer.forward
