"""Logits hooks: penalties, biases, a grammar, and the likeliest tokens.

One `RowHook` a sample (`e3rl.engine.protocol.LogitsHook`). Erasing costs it nothing: it is shown the tokens that a row has,
and erased ones are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from e3rl.serve.requests import Shaping

if TYPE_CHECKING:
    from torch import Tensor

FORBIDDEN = -1e30
"""Used in place of minus infinity, which an engine reports as non-finite logits."""


class Matcher(Protocol):
    """Follows a grammar through a row's tokens (`e3rl.serve.grammar`)."""

    error: str | None

    def allowed(self, generated: Sequence[int]) -> Tensor:
        """Which tokens may come next, as booleans [V]."""


class RowHook:
    """Changes one sample's logits as ``shaping`` says, then notes the ``top`` likeliest tokens of each place."""

    def __init__(
        self,
        shaping: Shaping,
        prompt: Sequence[int],
        eos_ids: Sequence[int],
        *,
        top: int = 0,
        temperature: float = 1.0,
        matcher: Matcher | None = None,
    ) -> None:
        self._shaping, self._prompt, self._eos = shaping, prompt, list(eos_ids)
        self._top, self._temperature, self._matcher = top, temperature, matcher
        self._likeliest: dict[int, list[tuple[int, float]]] = {}

    @staticmethod
    def needed(shaping: Shaping, top: int) -> bool:
        """Whether a request needs hooks at all."""
        return top > 0 or shaping != Shaping()

    @property
    def error(self) -> str | None:
        """Why the grammar could not be followed to its end; the row was ended then."""
        return self._matcher.error if self._matcher else None

    def __call__(self, logits_V: Tensor, generated: Sequence[int]) -> None:
        shaping = self._shaping
        if shaping.repetition != 1 or shaping.frequency or shaping.presence:
            self._penalise(logits_V, generated)
        for token, bias in shaping.bias:
            logits_V[token] += bias
        eos = [i for i in self._eos if i < len(logits_V)]
        if shaping.ignore_eos or len(generated) < shaping.min_tokens:
            logits_V[eos] = _forbidden(logits_V)
        if self._matcher is not None:
            allowed_V = self._matcher.allowed(generated).to(logits_V.device)
            logits_V[: len(allowed_V)].masked_fill_(~allowed_V[: len(logits_V)], _forbidden(logits_V))
            logits_V[len(allowed_V) :] = _forbidden(logits_V)
        if self._top:
            logp_V = (logits_V.float() / self._temperature).log_softmax(-1)
            found = logp_V.topk(min(self._top, len(logp_V)))
            self._likeliest[len(generated)] = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def likeliest(self, start: int, stop: int) -> list[list[tuple[int, float]]]:
        """The likeliest tokens with their log-probabilities at the places from ``start`` on."""
        return [self._likeliest.pop(place, []) for place in range(start, stop)]

    def _penalise(self, logits_V: Tensor, generated: Sequence[int]) -> None:
        """As vLLM: repetition counts the prompt, frequency and presence what was generated."""
        import torch

        shaping = self._shaping
        if shaping.repetition != 1:
            seen = torch.tensor(sorted({*self._prompt, *generated}), dtype=torch.long, device=logits_V.device)
            chosen = logits_V[seen]
            changed = torch.where(chosen > 0, chosen / shaping.repetition, chosen * shaping.repetition)
            logits_V[seen] = changed.nan_to_num()  # of half precision: what overflowed is the largest number
        if generated and (shaping.frequency or shaping.presence):
            ids = torch.tensor(list(generated), dtype=torch.long, device=logits_V.device)
            tokens, counts = ids.unique(return_counts=True)
            logits_V[tokens] -= (shaping.frequency * counts + shaping.presence).to(logits_V.dtype)


def _forbidden(logits_V: Tensor) -> float:
    import torch

    least = torch.finfo(logits_V.dtype).min
    return max(FORBIDDEN, least) if math.isfinite(least) else FORBIDDEN
