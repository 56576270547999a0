"""Log-probabilities and entropies from hidden states, in chunks of tokens: no [tokens, V] matrix ever exists whole.

The backward pass computes each chunk's logits once more and turns them into gradients in place, so that with and
without gradients the peak is a chunk or two, beside the gradient of the output matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.equations.tokens import logprob_gradient, token_scores
from e3rl.errors import UserError

_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32
_SMALLEST_CHUNK = 16  # tokens; fewer waste the matrix product


def _chunk_size(vocabulary: int) -> int:
    return max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // vocabulary)


def chunk_bytes(tokens: int, vocabulary: int) -> int:
    """Memory of the two chunks that exist at once."""
    return 2 * 4 * min(tokens, _chunk_size(vocabulary)) * vocabulary


def gradient_bytes(matrix: Tensor) -> int:
    """Memory of the output matrix's gradient: its float32 sum, and of other types one chunk's part of it."""
    return 4 * matrix.numel() + (0 if matrix.dtype == torch.float32 else matrix.nbytes)


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = _chunk_size(vocabulary)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class _HeadScores(torch.autograd.Function):
    """d log p(id) / d logits = onehot(id) - p: all that the backward pass needs beside the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_K: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        logprobs_K, entropies_K, log_z_K = torch.empty(3, len(ids_K), device=hidden_KD.device).unbind()
        for part in _chunks(len(ids_K), len(weight_VD)):
            logits_CV = nn.functional.linear(hidden_KD[part], weight_VD, bias_V).float()
            logprobs_K[part], entropies_K[part], log_z_K[part] = token_scores(logits_CV, ids_K[part], temperature)
        ctx.save_for_backward(hidden_KD, weight_VD, bias_V, ids_K, log_z_K)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies_K)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        hidden_KD, weight_VD, bias_V, ids_K, log_z_K = ctx.saved_tensors
        gradient_K = gradients[0].float()
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        hidden_gradient_KD = torch.empty_like(hidden_KD) if to_hidden else None
        # hundreds of chunks are added up: in float32, whatever the weights are in
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if to_weight else None
        bias_gradient_V = torch.zeros_like(bias_V, dtype=torch.float32) if to_bias else None
        for part in _chunks(len(ids_K), len(weight_VD)):
            logits_CV = nn.functional.linear(hidden_KD[part], weight_VD, bias_V).float()
            slope_CV = logprob_gradient(logits_CV, log_z_K[part], ids_K[part], gradient_K[part], ctx.temperature)
            slope_CV = slope_CV.to(weight_VD.dtype)
            if hidden_gradient_KD is not None:
                torch.mm(slope_CV, weight_VD, out=hidden_gradient_KD[part])
            if weight_gradient_VD is not None and weight_VD.dtype == torch.float32:
                weight_gradient_VD.addmm_(slope_CV.T, hidden_KD[part])
            elif weight_gradient_VD is not None:
                weight_gradient_VD += slope_CV.T @ hidden_KD[part]
            if bias_gradient_V is not None:
                bias_gradient_V += slope_CV.sum(0, dtype=torch.float32)
        return hidden_gradient_KD, _as(weight_gradient_VD, weight_VD), _as(bias_gradient_V, bias_V), None, None


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in its parameter's type."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def head_scores(head: nn.Linear, hidden_KD: Tensor, ids_K: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each id (with gradient) and entropy (nats) of the distribution it was drawn from."""
    found: tuple[Tensor, Tensor] = _HeadScores.apply(hidden_KD, head.weight, head.bias, ids_K, temperature)  # type: ignore[no-untyped-call]
    return found


def output_matrix(model: Any) -> nn.Linear:
    """The model's output matrix; refused where it is anything else, an adapter for example."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"the output matrix of {type(model).__name__} is a {type(head).__name__}: e3rl trains through a plain one. "
            "Leave it out of model.lora_target_modules"
        )
    return head
