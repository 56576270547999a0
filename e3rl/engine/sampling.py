"""From logits to tokens and what is measured about them, for many rows at once.

Pure: the only randomness is one uniform number per row. Shapes: S rows, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.storage import PACK
from e3rl.equations import tokens
from e3rl.errors import UserError

NON_FINITE = -1
"""The id in `Samples.ids_S` of a row whose logits are not all finite."""

_NO_TOP_K = 2**31

_CPU_ENTRIES = 2**19
"""Logits that a CPU works on at once. What is calculated from more leaves the cache, and the C library gives memory of
that size back to the system after each step and fetches it again, page by page."""


class Samples(NamedTuple):
    """One token per row and its measures, the numbers of `Candidate` that belong to one token."""

    ids_S: Tensor
    logprobs_S: Tensor
    entropies_S: Tensor
    perturbations_S: Tensor
    kept_mass_S: Tensor
    ranks_S: Tensor

    def numbers(self) -> Tensor:
        """All of it as one tensor [S, 6], to be read from the device at once; exact: ids and ranks are whole numbers."""
        return torch.stack([field.double() for field in self], dim=1)

    def measures(self) -> list[np.ndarray]:
        """The measures of each row, [5], off the device."""
        return [*self.numbers()[:, 1:].cpu().numpy()]


def check_sampling(sampling: Sampling) -> None:
    """Raise UserError where a setting is out of range."""
    if not 0 < sampling.temperature < float("inf"):
        raise UserError(f"temperature = {sampling.temperature} is out of range: it must be above 0")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p = {sampling.top_p} is out of range: it must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise UserError(f"top_k = {sampling.top_k} is out of range: it must be at least 0, which keeps all tokens")
    if not 0 <= sampling.min_p <= 1:
        raise UserError(f"min_p = {sampling.min_p} is out of range: it must be from 0, which keeps all tokens, to 1")
    if sampling.entropy_distribution not in ("full", "truncated"):
        raise UserError(f"entropy_distribution = '{sampling.entropy_distribution}': it must be 'full' or 'truncated'")
    if not 0 <= sampling.measured_at < float("inf"):
        raise UserError(
            f"measured_at = {sampling.measured_at} is out of range: it must be at least 0, which is as drawn"
        )
    if sampling.measured_at and sampling.entropy_distribution == "truncated":
        raise UserError(
            "entropy_distribution = 'truncated' is the distribution that is drawn from: measured_at must be 0"
        )


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling settings of several rows as tensors. ``depth``: likeliest tokens to look at for top-k and top-p; 0: none."""

    temperature_S1: Tensor
    measured_at_S1: Tensor
    top_k_S1: Tensor
    top_p_S1: Tensor
    min_p_S1: Tensor
    truncates_S1: Tensor
    ranks_S1: Tensor  # truncates by top-k or top-p
    truncated_entropy_S: Tensor
    depth: int
    any_min_p: bool
    any_truncated_entropy: bool
    any_measured_apart: bool

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | str) -> SamplingRows:
        """The settings of each row; what later decides about work (``depth``) is settled here, without the device."""
        return _settings(tuple(rows), torch.device(device))

    def part(self, rows: slice | Tensor) -> SamplingRows:
        """The settings of some of the rows."""
        return replace(
            self,
            temperature_S1=self.temperature_S1[rows],
            measured_at_S1=self.measured_at_S1[rows],
            top_k_S1=self.top_k_S1[rows],
            top_p_S1=self.top_p_S1[rows],
            min_p_S1=self.min_p_S1[rows],
            truncates_S1=self.truncates_S1[rows],
            ranks_S1=self.ranks_S1[rows],
            truncated_entropy_S=self.truncated_entropy_S[rows],
        )


@functools.lru_cache(maxsize=64)  # the same few batches of settings recur at every poll
def _settings(rows: tuple[Sampling, ...], device: torch.device) -> SamplingRows:
    ranks = [r.top_k > 0 or r.top_p < 1 for r in rows]
    truncates = [by_rank or r.min_p > 0 for r, by_rank in zip(rows, ranks, strict=True)]
    top_k = [r.top_k or _NO_TOP_K for r in rows]
    measured_at = [r.measured_at or r.temperature for r in rows]
    truncated_entropy = [r.entropy_distribution == "truncated" for r in rows]

    def column(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

    return SamplingRows(
        temperature_S1=column([r.temperature for r in rows], torch.float32),
        measured_at_S1=column(measured_at, torch.float32),
        top_k_S1=column(top_k, torch.long),
        top_p_S1=column([r.top_p for r in rows], torch.float32),
        min_p_S1=column([r.min_p for r in rows], torch.float32),
        truncates_S1=column(truncates, torch.bool),
        ranks_S1=column(ranks, torch.bool),
        truncated_entropy_S=column(truncated_entropy, torch.bool).squeeze(1),
        depth=max((k for k, by_rank in zip(top_k, ranks, strict=True) if by_rank), default=0),
        any_min_p=any(r.min_p > 0 for r in rows),
        any_truncated_entropy=any(truncated_entropy),
        any_measured_apart=any(r.temperature != at for r, at in zip(rows, measured_at, strict=True)),
    )


def sample(logits_SV: Tensor, rows: SamplingRows, uniforms_S: Tensor) -> Samples:
    """One token per row from its temperature-scaled, truncated distribution, with entropy and perturbation.

    Everything measured belongs to the distribution before truncation, unless the row asks for the truncated entropy; entropy
    and perturbation to the temperature that the row is measured at.
    A row with NaN or infinite logits gets the id `NON_FINITE`.
    """
    parts = _parts(logits_SV)
    if len(parts) == 1:
        return _sample_part(logits_SV, rows, uniforms_S)
    each = [_sample_part(logits_SV[part], rows.part(part), uniforms_S[part]) for part in parts]
    return Samples(*map(torch.cat, zip(*each, strict=True)))


def _parts(logits_SV: Tensor) -> list[slice]:
    """The rows in parts that are worked on one after the other, of a multiple of `PACK` each; a GPU takes all at once."""
    rows, vocabulary = logits_SV.shape
    size = max(PACK, _CPU_ENTRIES // vocabulary // PACK * PACK) if logits_SV.device.type == "cpu" else rows
    return [slice(start, start + size) for start in range(0, rows, size)]


def _sample_part(logits_SV: Tensor, rows: SamplingRows, uniforms_S: Tensor) -> Samples:
    logp_SV = tokens.token_distribution(logits_SV.float(), rows.temperature_S1)
    p_SV = logp_SV.exp()
    entropies_S = tokens.token_entropy(p_SV, logp_SV)
    nonfinite_S = ~entropies_S.isfinite()  # any NaN, +inf or -inf logit reaches this sum
    kept_mass_S = torch.ones_like(entropies_S)
    if rows.depth or rows.any_min_p:
        thresholds_S1 = truncation_thresholds(p_SV, rows)
        p_SV.masked_fill_(p_SV < thresholds_S1, 0.0)
        kept_mass_S = torch.where(rows.truncates_S1.squeeze(1), p_SV.sum(-1).clamp(max=1.0), kept_mass_S)
        if rows.any_truncated_entropy:
            truncated_S = tokens.truncated_entropy(p_SV, logp_SV, kept_mass_S)
            entropies_S = torch.where(rows.truncated_entropy_S, truncated_S, entropies_S)
    ids_S = inverse_cdf(p_SV, uniforms_S)
    logprobs_S1 = logp_SV.gather(1, ids_S.unsqueeze(1))
    greedy_S1 = tokens.greedy_logprob(logp_SV)
    perturbations_S = tokens.perturbation(greedy_S1, logprobs_S1)
    if rows.any_measured_apart:
        ratio_S1 = rows.temperature_S1 / rows.measured_at_S1
        rescaled_S = tokens.rescaled_entropy(logp_SV, greedy_S1, ratio_S1, scratch_SV=p_SV)
        entropies_S = torch.where(ratio_S1.squeeze(1) == 1, entropies_S, rescaled_S)
        perturbations_S = perturbations_S * ratio_S1.squeeze(1)
    likelier_SV = torch.gt(logp_SV, logprobs_S1, out=p_SV)  # as floats: several times as fast as a comparison to bool
    return Samples(
        ids_S=ids_S.masked_fill(nonfinite_S, NON_FINITE),
        logprobs_S=logprobs_S1.squeeze(1),
        entropies_S=entropies_S.clamp(min=0.0),
        perturbations_S=perturbations_S,
        kept_mass_S=kept_mass_S,
        ranks_S=likelier_SV.sum(-1).int() + 1,  # exact: whole numbers below 2**24
    )


def truncation_thresholds(p_SV: Tensor, rows: SamplingRows) -> Tensor:
    """The smallest probability that min-p, then top-k, then top-p over what those left, keep in each row, [S, 1].

    A threshold in place of a set of tokens: equally likely tokens are kept or dropped together, so the outcome depends
    on the row's numbers alone and not on a sorting order.
    """
    least_S1 = p_SV.amax(-1, keepdim=True) * rows.min_p_S1 if rows.any_min_p else None
    if least_S1 is not None and not rows.depth:
        return least_S1
    likeliest_SK = p_SV.topk(min(rows.depth, p_SV.shape[1])).values
    last_S1 = rows.top_k_S1.clamp(max=likeliest_SK.shape[1]) - 1
    kth_S1 = likeliest_SK.gather(1, last_S1)
    if least_S1 is not None:
        kth_S1 = kth_S1.maximum(least_S1)
    mass_S1 = p_SV.masked_fill(p_SV < kth_S1, 0.0).sum(-1, keepdim=True)
    before_S1 = (likeliest_SK.cumsum(-1) < rows.top_p_S1 * mass_S1).sum(-1, keepdim=True)
    nucleus_S1 = torch.where(rows.top_p_S1 < 1, before_S1.minimum(last_S1), last_S1)
    thresholds_S1 = torch.where(rows.ranks_S1, likeliest_SK.gather(1, nucleus_S1), 0.0)
    return thresholds_S1 if least_S1 is None else thresholds_S1.maximum(least_S1)


def inverse_cdf(weights_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """The token at which the running sum of a row's weights, in vocabulary order, exceeds uniform * total.

    Found block by block, in double precision: no running sum over the whole vocabulary is stored, and no token of
    weight 0 can be drawn.
    """
    size = weights_SV.shape[1]
    block = 2 ** (size.bit_length() // 2)  # as many blocks as tokens in one, or nearly
    whole = size // block
    sums_SB = torch.cat(
        [
            weights_SV[:, : whole * block].unflatten(1, (whole, block)).sum(-1),
            weights_SV[:, whole * block :].sum(-1, keepdim=True),
        ],
        dim=1,
    ).double()
    targets_S1 = uniforms_S.double().unsqueeze(1) * sums_SB.sum(-1, keepdim=True)
    block_S1, rest_S1 = _first_above(sums_SB, targets_S1)
    tokens_SB = block_S1 * block + torch.arange(block, device=weights_SV.device)
    inside_SB = tokens_SB < size
    within_SB = weights_SV.gather(1, tokens_SB.clamp(max=size - 1)).double() * inside_SB
    offset_S1, _ = _first_above(within_SB, rest_S1)
    return block_S1.squeeze(1) * block + offset_S1.squeeze(1)


def _first_above(weights_SK: Tensor, targets_S1: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first positive weight whose running sum exceeds the target, and the target less what came before."""
    running_SK = weights_SK.cumsum(-1)
    total_S1 = running_SK[:, -1:]
    targets_S1 = targets_S1.minimum(total_S1.nextafter(torch.zeros_like(total_S1)))  # rounding can reach the total
    hits_SK = (running_SK > targets_S1) & (weights_SK > 0)  # a parallel running sum may rise by rounding alone
    index_S1 = hits_SK.view(torch.int8).argmax(-1, keepdim=True)
    before_S1 = running_SK.gather(1, index_S1) - weights_SK.gather(1, index_S1)
    return index_S1, (targets_S1 - before_S1).clamp(min=0.0)
