"""One forward pass over finished sequences: log-probabilities, entropies, attention shares.

The vocabulary is met in chunks of tokens, so that no [tokens, V] matrix of the whole batch ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from e3rl.equations.attribution import attention_shares
from e3rl.errors import UserError
from e3rl.models import unwrapped
from e3rl.train.attribution import AttributionTap, tapped
from e3rl.train.sequences import TrainSequence, pad, plan_micro_batches

_CHUNK_ELEMENTS = 2**25  # logits held at once: 128 MiB in float32
_SMALLEST_CHUNK = 16  # tokens; fewer waste the matrix product


@dataclass(frozen=True)
class AttributionSettings:
    """L' and the layers of eq 19."""

    window: int
    layers: frozenset[int]


@dataclass(frozen=True)
class Scores:
    """What a forward pass says of one sequence's response tokens. ``shares_T`` is None where it was not asked for."""

    logprobs_T: Tensor
    entropies_T: Tensor
    shares_T: Tensor | None


@dataclass(frozen=True)
class PaddedSequences:
    """Sequences as model input: prompt and response, padded on the right."""

    ids_SL: Tensor
    prompt_lengths_S: Tensor
    lengths_S: Tensor

    @classmethod
    def of(cls, sequences: Sequence[TrainSequence], device: torch.device) -> PaddedSequences:
        ids = [torch.tensor(s.prompt_ids + s.response_ids) for s in sequences]
        prompt_lengths = torch.tensor([len(s.prompt_ids) for s in sequences], device=device)
        return cls(pad(ids, 0, device), prompt_lengths, torch.tensor([len(i) for i in ids], device=device))

    @property
    def response_ST(self) -> Tensor:
        """bool [S, T]: real response tokens, aligned to the response's first token."""
        size_S = self.lengths_S - self.prompt_lengths_S
        return torch.arange(int(size_S.max()), device=size_S.device) < size_S[:, None]

    @property
    def position_ST(self) -> Tensor:
        """Where in ``ids_SL`` each response token stands (clamped in padding)."""
        offset_T = torch.arange(self.response_ST.shape[1], device=self.lengths_S.device)
        return (self.prompt_lengths_S[:, None] + offset_T).clamp(max=self.ids_SL.shape[1] - 1)


def _chunk_scores(head: Any, hidden_KD: Tensor, ids_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_KV = head(hidden_KD).float() / temperature
    log_z_K = logits_KV.logsumexp(-1)
    logprob_K = logits_KV.gather(-1, ids_K[:, None]).squeeze(-1) - log_z_K
    with torch.no_grad():
        entropy_K = log_z_K - (torch.softmax(logits_KV, -1) * logits_KV).sum(-1)
    return logprob_K, entropy_K


def head_scores(head: Any, hidden_KD: Tensor, ids_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each id and entropy (nats) of the distribution it was drawn from, for K hidden states."""
    vocabulary = head.weight.shape[0]
    size = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // int(vocabulary))
    parts = []
    for start in range(0, len(ids_K), size):
        chunk = (head, hidden_KD[start : start + size], ids_K[start : start + size], temperature)
        if torch.is_grad_enabled() and len(ids_K) > size:
            parts.append(checkpoint(_chunk_scores, *chunk, use_reentrant=False))
        else:
            parts.append(_chunk_scores(*chunk))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def response_scores(model: Any, padded: PaddedSequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (with gradient) and entropies of the response tokens, [S, T], 0 in padding."""
    base = unwrapped(model)
    backbone = getattr(base, base.base_model_prefix)
    visible_SL = torch.arange(padded.ids_SL.shape[1], device=padded.ids_SL.device) < padded.lengths_S[:, None]
    hidden_SLD = backbone(input_ids=padded.ids_SL, attention_mask=visible_SL.long(), use_cache=False).last_hidden_state
    real_ST, position_ST = padded.response_ST, padded.position_ST
    row_ST = torch.arange(len(position_ST), device=position_ST.device)[:, None].expand_as(position_ST)
    hidden_KD = hidden_SLD[row_ST[real_ST], position_ST[real_ST] - 1]  # the state before a token predicts it
    logprob_K, entropy_K = head_scores(
        base.get_output_embeddings(),
        hidden_KD,
        padded.ids_SL[row_ST[real_ST], position_ST[real_ST]],
        temperature,
    )
    blank_ST = torch.zeros(real_ST.shape, device=real_ST.device)
    return blank_ST.masked_scatter(real_ST, logprob_K), blank_ST.masked_scatter(real_ST, entropy_K)


def require_plain_head(model: Any) -> None:
    """Refuse models whose logits are more than their output matrix times the hidden state: scoring would be wrong."""
    base = unwrapped(model)
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        hidden = getattr(base, base.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
        split, whole = base.get_output_embeddings()(hidden).float(), base(input_ids=ids).logits.float()
    if not torch.allclose(split, whole, atol=1e-3, rtol=1e-3):
        raise UserError(f"{type(base).__name__} transforms its logits after the output matrix; e3rl can't train it")


@torch.no_grad()
def score_sequences(
    model: Any,
    sequences: Sequence[TrainSequence],
    *,
    temperature: float,
    token_budget: int,
    attribution: AttributionSettings | None = None,
) -> list[Scores]:
    """Scores of every sequence, in their order, on the CPU; shares only where ``attribution`` is given."""
    device = next(model.parameters()).device
    scores: dict[int, Scores] = {}
    model.eval()
    for batch in plan_micro_batches([s.length for s in sequences], token_budget):
        padded = PaddedSequences.of([sequences[i] for i in batch], device)
        shares_ST = None
        if attribution is None:
            logprobs_ST, entropies_ST = response_scores(model, padded, temperature)
        else:
            tap = AttributionTap(padded.prompt_lengths_S, padded.lengths_S, attribution.window, attribution.layers)
            with tapped(model, tap):
                logprobs_ST, entropies_ST = response_scores(model, padded, temperature)
            real_ST = padded.response_ST
            shares_ST = attention_shares(tap.attribution().gather(1, padded.position_ST) * real_ST, real_ST).cpu()
        logprobs_ST, entropies_ST = logprobs_ST.cpu(), entropies_ST.cpu()
        for row, index in enumerate(batch):
            size = len(sequences[index].response_ids)
            shares_T = None if shares_ST is None else shares_ST[row, :size]
            scores[index] = Scores(logprobs_ST[row, :size], entropies_ST[row, :size], shares_T)
    return [scores[i] for i in range(len(sequences))]
