"""Group baseline and adaptive threshold: paper §3.3 (eq 14-18, 26). Numbers of one segment index, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST_BASELINE = 1e-6
"""With a baseline below 0 the attempt penalty would lower the threshold instead of raising it."""


def group_moments(values_G: Tensor) -> tuple[Tensor, Tensor]:
    """Eq 14-15. Mean and population standard deviation of U_n over the siblings that have a segment n."""
    return values_G.mean(), values_G.std(correction=0)


def offset(std: Tensor, kappa0: float, kappa1: float, sigma0: float, eps: float = 1e-6) -> Tensor:
    """Eq 16. kappa(sigma) = kappa_0 + kappa_1 tanh((sigma - sigma_0) / (sigma_0 + eps))."""
    return kappa0 + kappa1 * torch.tanh((std - sigma0) / (sigma0 + eps))


def macro_baseline(mean: Tensor, std: Tensor, offset: Tensor) -> Tensor:
    """Eq 16. B_n = mu + kappa(sigma) sigma."""
    return mean + offset * std


def floored(baseline: float, mean: float) -> float:
    """Eq 16. B_n, or `LOWEST_BASELINE` where B_n <= 0 < mean, that is where kappa(sigma) < -mu/sigma."""
    return LOWEST_BASELINE if baseline <= 0 < mean else baseline


def quantile_baseline(values_G: Tensor, share: float) -> Tensor:
    """Replaces eq 14-16: the ``share`` quantile of the siblings' U, interpolated linearly.

    U is heavy-tailed: how many siblings lie above mean + kappa * std depends on the tail, how many above a quantile does not.
    """
    return values_G.quantile(share)


def reservation_value(values_G: Tensor, cost: float) -> float:
    """Replaces eq 14-16 (Weitzman, ours): the z with mean (v - z)^+ = ``cost`` over draws worth ``values_G``.

    Another draw pays as long as what is at hand is worth less. At or below 0: no draw is worth its cost.
    """
    ordered_G = values_G.sort(descending=True).values
    z_G = (ordered_G.cumsum(0) - len(ordered_G) * cost) / torch.arange(1, len(ordered_G) + 1)  # if so many are above it
    next_G = torch.cat([ordered_G[1:], ordered_G.new_tensor([-torch.inf])])
    return float(z_G[int((z_G >= next_G).nonzero()[0])])


def reservation_baseline(totals_G: Tensor, odds: float, cost: float) -> float:
    """Replaces eq 14-16 (ours): the U of a candidate worth the reservation value; the largest U where that is at or below 0.

    A candidate of uncertainty U is worth sigmoid(``odds`` - U), the probability that its response is right.
    """
    z = reservation_value(torch.sigmoid(odds - totals_G), cost)
    z = min(z, 1 - 1e-12)
    return float(totals_G.max()) if z <= 0 else odds - math.log(z / (1 - z))


def attempt_penalty(attempt: int, eta: float, delta: float) -> Tensor:
    """Eq 17, 26. Gamma(e) = exp(eta e^delta), gamma_e in eq 26: 1 for the first candidate, then rising."""
    return torch.tensor(eta * attempt**delta, dtype=torch.float64).exp()


def modulation(smoothed_GN: Tensor, baselines_N: Tensor, rho: float, eps: float = 1e-6) -> Tensor:
    """Eq 18. phi = 1 + rho tanh(mean_m (H~_m - B_m) / (B_m + eps)) over each trajectory's earlier segments, [G].

    Raises ValueError without earlier segments: the first segment's phi is the setting ``first_modulation``.
    """
    if smoothed_GN.shape[-1] == 0:
        raise ValueError("eq 18 is defined for n > 1: there is no earlier segment to modulate with")
    return 1 + rho * torch.tanh(((smoothed_GN - baselines_N) / (baselines_N + eps)).mean(-1))


def threshold(baseline: float, penalty: float, modulation_G: Tensor) -> Tensor:
    """Eq 17, 26. Theta_n(e) = B_n Gamma(e) phi, for a first candidate and its retries. Only Gamma changes with a retry."""
    return baseline * penalty * modulation_G
