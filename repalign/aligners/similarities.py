"""Losses between student and target tokens, [B, N, D] x [B, N, D] -> [B]."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Cosine:
    """Minus the mean cosine of corresponding tokens, in [-1, 1]; norms are floored at 1e-12 (REPA)."""

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        product = F.normalize(student, dim=-1) * F.normalize(target, dim=-1)
        return -product.sum(-1).mean(-1)


class CosineDistance:
    """One minus the mean cosine of corresponding tokens, in [0, 2]; norms are floored at 1e-8 (DDT).

    Its gradient is :class:`Cosine`'s, its smallest value 0.
    """

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return 1 - F.cosine_similarity(student, target, dim=-1, eps=1e-8).mean(-1)
