"""Normalisation layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.precision import at_least_float32


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (arXiv:1910.07467).

    The division is in float32 whatever the precision, its result returns to that of x before it meets the weight (DDT's
    order, which bfloat16 can tell from the other one).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight
