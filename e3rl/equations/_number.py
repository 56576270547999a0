"""Arguments that may be plain numbers or tensors."""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor


def as_tensor(value: Number) -> Tensor:
    """``value`` itself if it is a tensor, else a 0-dim float64 tensor: exact, and it never widens a larger operand."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
