"""One forward pass over finished sequences: log-probabilities, entropies, attention shares.

Log-probabilities and entropies are made from hidden states in chunks of tokens: no [tokens, V] matrix exists whole. The
backward pass computes each chunk's logits once more and turns them into gradients in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.cluster.context import divided
from e3rl.cluster.ranks import Ranks
from e3rl.engine.torch.cache import unknown_layers
from e3rl.engine.torch.operations import PLAIN_LOGITS, LogitTransform
from e3rl.engine.torch.recorded import allocates
from e3rl.equations.tokens import logprob_gradient, token_scores
from e3rl.errors import UserError
from e3rl.models import narrow_window, unwrapped
from e3rl.train.attribution import AttributionSettings, AttributionTap, packed_attention, router_loss
from e3rl.train.packing import PackedRow, TrainSequence, packed_rows, pad, recurrent_mixers

_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32
_SMALLEST_CHUNK = 16  # tokens; fewer waste the matrix product


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class _HeadScores(torch.autograd.Function):
    """d log p(id) / d logits = onehot(id) - p: all that the backward pass needs beside the logits themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_K: Tensor,
        temperature: float,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        logprobs_K, entropies_K, log_z_K = torch.empty(3, len(ids_K), device=hidden_KD.device).unbind()
        for part in _chunks(len(ids_K), len(weight_VD)):
            logits_CV = transform.of(nn.functional.linear(hidden_KD[part], weight_VD, bias_V).float())
            logprobs_K[part], entropies_K[part], log_z_K[part] = token_scores(logits_CV, ids_K[part], temperature)
        ctx.save_for_backward(hidden_KD, weight_VD, bias_V, ids_K, log_z_K)
        ctx.temperature, ctx.transform = temperature, transform
        ctx.mark_non_differentiable(entropies_K)
        return logprobs_K, entropies_K

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (hidden_KD, weight_VD, bias_V, ids_K, log_z_K), transform = ctx.saved_tensors, ctx.transform
        gradient_K = gradients[0].float()
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        hidden_gradient_KD = torch.empty_like(hidden_KD) if to_hidden else None
        # sums over hundreds of chunks are in float32, whatever the weights are
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if to_weight else None
        bias_gradient_V = torch.zeros_like(bias_V, dtype=torch.float32) if to_bias else None
        for part in _chunks(len(ids_K), len(weight_VD)):
            logits_CV = transform.of(nn.functional.linear(hidden_KD[part], weight_VD, bias_V).float())
            rise = transform.slope(logits_CV)
            slope_CV = logprob_gradient(logits_CV, log_z_K[part], ids_K[part], gradient_K[part], ctx.temperature)
            slope_CV = (slope_CV if transform == PLAIN_LOGITS else slope_CV.mul_(rise)).to(weight_VD.dtype)
            if hidden_gradient_KD is not None:
                torch.mm(slope_CV, weight_VD, out=hidden_gradient_KD[part])
            if weight_gradient_VD is not None and weight_VD.dtype == torch.float32:
                weight_gradient_VD.addmm_(slope_CV.T, hidden_KD[part])
            elif weight_gradient_VD is not None:
                weight_gradient_VD += slope_CV.T @ hidden_KD[part]
            if bias_gradient_V is not None:
                bias_gradient_V += slope_CV.sum(0, dtype=torch.float32)
        return hidden_gradient_KD, _as(weight_gradient_VD, weight_VD), _as(bias_gradient_V, bias_V), None, None, None


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in its parameter's type."""
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)


def head_scores(
    head: nn.Linear,
    hidden_KD: Tensor,
    ids_K: Tensor,
    temperature: float,
    transform: LogitTransform = PLAIN_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each id (with gradient) and entropy (nats) of the distribution it was drawn from."""
    found: tuple[Tensor, Tensor] = _HeadScores.apply(  # type: ignore[no-untyped-call]
        hidden_KD, head.weight, head.bias, ids_K, temperature, transform
    )
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


@dataclass(frozen=True)
class Scores:
    """What a forward pass says of one sequence's response tokens. ``shares_T`` is None where it was not asked for."""

    logprobs_T: Tensor
    entropies_T: Tensor
    shares_T: Tensor | None


@dataclass(frozen=True)
class RowScores:
    """The same of a whole row, with the gradient of its log-probabilities; 0 where no response token lies."""

    row: PackedRow
    logprobs_N: Tensor
    entropies_N: Tensor
    shares: Sequence[Tensor | None]
    router_loss: Tensor | None = None  # of the row's tokens, where the row asks for it

    def logprobs_ST(self) -> Tensor:
        """Log-probabilities of each sequence's response tokens, with gradient; 0 in padding."""
        paths = self.row.response_paths()
        index_ST = pad(paths, -1, self.logprobs_N.device)
        found_ST = self.logprobs_N.index_select(0, index_ST.clamp(min=0).flatten()).view(index_ST.shape)
        return found_ST.masked_fill(index_ST < 0, 0.0)

    def by_sequence(self) -> list[Scores]:
        """Each sequence's scores, on the CPU and without gradient. Two reads from the device."""
        logprobs_N, entropies_N = torch.stack([self.logprobs_N.detach(), self.entropies_N]).cpu()
        known = [shares_T for shares_T in self.shares if shares_T is not None]
        read = iter(torch.cat(known).cpu().split([len(shares_T) for shares_T in known]) if known else ())
        return [
            Scores(logprobs_N[path_T], entropies_N[path_T], None if shares_T is None else next(read))
            for path_T, shares_T in zip(self.row.response_paths(), self.shares, strict=True)
        ]


def score_row(
    model: Any, row: PackedRow, temperature: float, attribution: AttributionSettings | None = None
) -> RowScores:
    """One forward pass over a row, inside `packed_attention`; of a row that ranks divide, over this one's share."""
    base, share = unwrapped(model), row.share
    tap = None if attribution is None else AttributionTap(row, attribution.window, attribution.layers)
    backbone = getattr(base, base.base_model_prefix)
    routers = {"output_router_logits": True} if row.routers and torch.is_grad_enabled() else {}
    ids_n, positions_n = (x_N if share is None else x_N[share.mine_n] for x_N in (row.ids_N, row.positions_N))
    output = backbone(
        input_ids=ids_n[None],
        position_ids=positions_n[None],
        # unused; without it the library reads the positions from the device
        attention_mask=torch.empty(1, 1, 1, 1, device=row.ids_N.device),
        use_cache=False,
        packed_row=row,
        attribution_tap=tap,
        **routers,
    )
    scored_K = row.scored_K if share is None else share.scored_k
    before_K = row.before_N.index_select(0, scored_K) if share is None else share.before_k
    hidden_KD = output.last_hidden_state[0].index_select(0, before_K)  # the state before a token predicts it
    logprobs_K, entropies_K = head_scores(
        output_matrix(base), hidden_KD, row.ids_N[scored_K], temperature, LogitTransform.of_model(base)
    )
    blank_N = torch.zeros(len(row.ids_N), device=row.ids_N.device)
    logprobs_N, entropies_N = (blank_N.index_copy(0, scored_K, x_K) for x_K in (logprobs_K, entropies_K))
    return RowScores(
        row,
        logprobs_N if share is None else share.together(logprobs_N),
        entropies_N if share is None else share.together(entropies_N),
        [None] * len(row.paths) if tap is None else tap.shares(),
        router_loss(base)(output.router_logits) if routers else None,
    )


class Passes:
    """Forward and backward passes through a model, as PyTorch runs them."""

    context = Ranks()
    """The ranks that divide the tokens of each row."""

    def divides(self, model: Any) -> bool:
        """Whether ranks exchange tensors in passes through this model."""
        return False

    def run(self, model: Any, work: Callable[[Any], Any]) -> Any:
        """What ``work`` makes of the model, whose weights it has whole."""
        return work(model)

    def rest(self, model: Any) -> None:
        """Let go of what passes without a backward pass brought together; all ranks call it, after as many of them."""

    @allocates
    def score_row(
        self, model: Any, row: PackedRow, temperature: float, attribution: AttributionSettings | None = None
    ) -> RowScores:
        """See `score_row`."""
        if self.context.world > 1:
            row = divided(row, self.context)
        logprobs_N, entropies_N, balance, *shares = self.run(
            model, partial(_scored, row=row, temperature=temperature, attribution=attribution)
        )
        return RowScores(row, logprobs_N, entropies_N, shares, balance)

    @allocates
    def backward(self, loss: Tensor) -> None:
        """Add this loss's gradients to those gathered so far."""
        loss.backward()


def _scored(
    model: Any, row: PackedRow, temperature: float, attribution: AttributionSettings | None
) -> tuple[Tensor | None, ...]:
    found = score_row(model, row, temperature, attribution)
    return (found.logprobs_N, found.entropies_N, found.router_loss, *found.shares)


@torch.no_grad()
def score_rows(
    passes: Passes,
    model: Any,
    rows: Sequence[PackedRow],
    temperature: float,
    attribution: AttributionSettings | None = None,
) -> list[Scores]:
    """Scores of every sequence of the rows, on the CPU; shares only where ``attribution`` is given."""
    model.eval()
    with packed_attention(model):
        found = [passes.score_row(model, row, temperature, attribution).by_sequence() for row in rows]
    return [scores for of_row in found for scores in of_row]


def score_sequences(
    model: Any,
    sequences: Sequence[TrainSequence],
    *,
    temperature: float,
    token_budget: int,
    attribution: AttributionSettings | None = None,
) -> list[Scores]:
    """Scores of every sequence, in their order, on the CPU; shares only where ``attribution`` is given."""
    whole, device = bool(recurrent_mixers(model)), next(model.parameters()).device
    rows = packed_rows(sequences, token_budget, device, whole=whole)
    return score_rows(Passes(), model, rows, temperature, attribution)


@torch.no_grad()
def require_scorable(model: Any, passes: Passes | None = None) -> None:
    """Refuse models whose log-probabilities in a packed row differ from those of a plain forward pass.

    That is: whose attention does not go through the attention registry of transformers, or whose logits are more than their
    output matrix times the hidden state, scaled or capped. Two responses part after two tokens, and tokens
    follow on both sides; windows are made so small that these outgrow them.
    """
    passes, base, device = passes or Passes(), unwrapped(model), next(model.parameters()).device
    if unknown := unknown_layers(model):
        raise _refusal(base, unknown)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size  # DeepSpeed leaves the embeddings no shape
    ids = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    other = [*ids[3:5], (ids[5] + 1) % vocabulary, *ids[6:]]
    sequences = [_sequence(ids[:3], response) for response in (ids[3:], other)]
    training = model.training
    model.eval()
    with narrow_window(model):
        try:
            with packed_attention(model):
                packed = passes.score_row(model, PackedRow.of(sequences, device), 1.0).by_sequence()
        except UserError:
            raise
        except TypeError as error:
            raise _refusal(base, f"its attention can't be told about packed sequences ({error})") from error
        except Exception as error:  # a model may choke on a packed row in any way
            reason = f"packed sequences can't pass through it ({type(error).__name__}: {error})"
            raise _refusal(base, reason) from error
        expected = [passes.run(model, partial(_plain_logprobs, sequence=s, device=device)) for s in sequences]
    model.train(training)
    passes.rest(model)
    allowed = 1e-3 if base.dtype == torch.float32 else 0.1
    for found, expected_T in zip(packed, expected, strict=True):
        difference = float((found.logprobs_T - expected_T).abs().max())
        if not difference <= allowed * float(expected_T.abs().max()):
            raise _refusal(base, f"packed sequences get log-probabilities that differ by {difference:.2g}")


def _plain_logprobs(model: Any, sequence: TrainSequence, device: torch.device) -> Tensor:
    """Log-probabilities of the response's tokens by a forward pass of the sequence alone."""
    base = unwrapped(model)
    whole_1T = torch.tensor([sequence.prompt_ids + sequence.response_ids], device=device)
    first = len(sequence.prompt_ids)
    logprobs_TV = base(input_ids=whole_1T, use_cache=False).logits[0, first - 1 : -1].float().log_softmax(-1)
    return logprobs_TV.gather(-1, whole_1T[0, first:, None]).squeeze(-1).cpu()


def _sequence(prompt: Sequence[int], response: Sequence[int]) -> TrainSequence:
    size = len(response)
    zeros_T = torch.zeros(size)
    return TrainSequence(tuple(prompt), tuple(response), zeros_T.long(), zeros_T == 0, zeros_T, 0, 0, False)


def _refusal(model: Any, reason: str) -> UserError:
    return UserError(
        f"e3rl can't train {type(model).__name__}: {reason}. It trains decoder-only models whose attention goes through "
        "transformers' attention registry and whose logits are their output matrix times the hidden state, scaled or capped"
    )
