"""Losses between student and target tokens, [B, N, D] x [B, N, D] -> [B]."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Cosine:
    """Minus the mean cosine of corresponding tokens, in [-1, 1]; norms are floored at 1e-12 (REPA)."""

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return self.per_token(student, target).mean(-1)

    def per_token(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        """Minus the cosine of each pair of tokens."""
        return -(F.normalize(student, dim=-1) * F.normalize(target, dim=-1)).sum(-1)


class CosineDistance:
    """One minus the mean cosine of corresponding tokens, in [0, 2]; norms are floored at 1e-8 (DDT).

    Its gradient is :class:`Cosine`'s, its smallest value 0.
    """

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return 1 - F.cosine_similarity(student, target, dim=-1, eps=1e-8).mean(-1)


class ChannelCosine:
    """One minus the mean cosine of corresponding channels, in [0, 2]: the cosine runs over the tokens (SRA's code).

    The released SRA code takes the cosine over the second axis of [B, N, D], most likely by oversight, and its results
    with ``cos`` are made with it; :class:`Cosine` is the cosine over the width. Norms are floored at 1e-8.
    """

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return self.per_channel(student, target).mean(-1)

    def per_channel(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """One minus the cosine of each pair of channels."""
        return 1 - F.cosine_similarity(student, target, dim=1)


class SmoothL1:
    """Mean of d^2 / (2 beta) where |d| < beta, of |d| - beta / 2 elsewhere; d = student - target (SRA: beta 0.05)."""

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return F.smooth_l1_loss(student, target, beta=self.beta, reduction="none").mean((1, 2))


class L1:
    """Mean absolute difference."""

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return (student - target).abs().mean((1, 2))


class L2:
    """Mean squared difference."""

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return (student - target).square().mean((1, 2))
