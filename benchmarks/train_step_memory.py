"""Peaks of memory for `train_step.py`, each measured in a process of its own."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from e3rl.train.scoring import head_scores


def _resident(field: str) -> float:
    """A line of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


class PeakMemory:
    """Peak resident memory above what it was when everything was loaded, MiB."""

    def start(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        self._base = _resident("VmRSS")

    def above(self) -> float:
        return _resident("VmHWM") - self._base


def touch(model: nn.Module) -> None:
    """Read every weight: a memory-mapped file is not resident until then."""
    for parameter in model.parameters():
        parameter.detach().sum()


def naive_scores(head: nn.Linear, hidden_KD: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook version: both from the whole log-softmax."""
    logp_KV = head(hidden_KD).log_softmax(-1)
    entropies_K = -(logp_KV.exp() * logp_KV).sum(-1)
    return logp_KV.gather(-1, ids_K[:, None]).squeeze(-1), entropies_K


def logits_of(how: str, tokens: int, gradient: bool, vocabulary: int = 151_936, width: int = 1024) -> dict[str, float]:
    """Peak memory and seconds of log-probabilities and entropies, in a process of its own."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(gradient)
    hidden_KD = torch.randn(tokens, width, requires_grad=gradient)
    ids_K = torch.randint(vocabulary, (tokens,))
    memory = PeakMemory()
    memory.start()
    began = time.perf_counter()
    with torch.set_grad_enabled(gradient):
        logprobs_K, entropies_K = (
            naive_scores(head, hidden_KD, ids_K) if how == "naive" else head_scores(head, hidden_KD, ids_K, 1.0)
        )
        if gradient:
            logprobs_K.sum().backward()
    return {
        "above_mib": memory.above(),
        "seconds": time.perf_counter() - began,
        "sum": float((logprobs_K + entropies_K).detach().sum()),
    }
