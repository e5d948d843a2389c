"""Trainable heads between a tap and its target."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.init import xavier_linear_


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
