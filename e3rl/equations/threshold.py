"""Group baseline and adaptive threshold: paper §3.3 (eq 14-18)."""

from __future__ import annotations

import torch
from torch import Tensor

from e3rl.equations._number import Number, as_tensor


def group_moments(values_G: Tensor) -> tuple[Tensor, Tensor]:
    """Eq 14-15. Mean and population standard deviation of U_n over the siblings that have a segment n (D4)."""
    return values_G.mean(), values_G.std(correction=0)


def offset(std: Number, kappa0: float, kappa1: float, sigma0: float, eps: float = 1e-6) -> Tensor:
    """Eq 16. kappa(sigma) = kappa_0 + kappa_1 tanh((sigma - sigma_0) / (sigma_0 + eps))."""
    return kappa0 + kappa1 * torch.tanh((as_tensor(std) - sigma0) / (sigma0 + eps))


def macro_baseline(mean: Number, std: Number, offset: Number) -> Tensor:
    """Eq 16. B_n = mu + kappa(sigma) sigma."""
    return as_tensor(mean + offset * std)


def quantile_baseline(values_G: Tensor, share: float) -> Tensor:
    """In place of eq 14-16: the value that ``share`` of the siblings lie below, between neighbours where it falls between.

    U is heavy-tailed: how many siblings lie above mean + kappa * std depends on the tail, how many above a quantile does not.
    """
    return values_G.quantile(share)


def attempt_penalty(attempt: int, eta: float, delta: float) -> Tensor:
    """Eq 17. Gamma(e) = exp(eta e^delta): 1 for the first candidate, rising with every erasure."""
    return as_tensor(eta * attempt**delta).exp()


def modulation(smoothed_N: Tensor, baselines_N: Tensor, rho: float, eps: float = 1e-6) -> Tensor:
    """Eq 18. phi = 1 + rho tanh(mean_m (H~_m - B_m) / (B_m + eps)) over a trajectory's earlier segments, [..., N].

    The first segment has none, and its phi is a setting (D6): calling this without history is an error.
    """
    if smoothed_N.shape[-1] == 0:
        raise ValueError("eq 18 is defined for n > 1: there is no earlier segment to modulate with")
    return 1 + rho * torch.tanh(((smoothed_N - baselines_N) / (baselines_N + eps)).mean(-1))


def threshold(baseline: Number, penalty: Number, modulation: Number) -> Tensor:
    """Eq 17. Theta_n(e) = B_n Gamma(e) phi."""
    return as_tensor(baseline * penalty * modulation)
