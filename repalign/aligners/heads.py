"""Trainable heads between a tap and its target."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.nn.init import xavier_linear_


def no_head(in_dim: int, out_dim: int) -> nn.Identity:
    """The hidden state itself is aligned (LayerSync).

    Raises:
        UserError: when tap and target differ in width.
    """
    if in_dim != out_dim:
        raise UserError(
            f"aligner.head: tap of width {in_dim} and target of width {out_dim} cannot be compared without a head; "
            "choose two layers of one width, or another aligner.head"
        )
    return nn.Identity()


class MLPHead(nn.Module):
    """Three linear layers with SiLU between, per token: the projector of REPA. Xavier-uniform weights, zero biases."""

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out_dim),
        )
        xavier_linear_(self)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return self.layers(x)


class TwoLayerHead(nn.Module):
    """Two linear layers with SiLU between, per token (SRA's head). Xavier-uniform weights, zero biases.

    Args:
        in_dim: width of the tap.
        out_dim: width of the target.
        expansion: hidden width over ``in_dim`` (SRA: 2).
    """

    def __init__(self, in_dim: int, out_dim: int, expansion: int = 2) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, expansion * in_dim)
        self.linear2 = nn.Linear(expansion * in_dim, out_dim)
        xavier_linear_(self)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return self.linear2(F.silu(self.linear1(x)))
