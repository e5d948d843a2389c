"""The velocity refiner with acceleration (VeRA) of DeepFlow."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.blocks import MLP, Modulation, modulate


class VeRA(nn.Module):
    """Velocity features of one branch to the input tokens of the next (DeepFlow, arXiv:2503.14494).

    A = ACC_MLP(h); u = LN([h, A]) (1 + scale) + shift, both from the embedded time gap; q = MLP(u);
    out = LNa(x) + Attention(LNa(x); LNa(q)), with one affine norm LNa and the embedded noisy input x as queries. The
    residual is the normalised query: the stream h is replaced, not added to.

    Args:
        dim: width D of tokens and features; the embedding of the time gap has 2 D.
        heads: number of attention heads.
        hidden: width P of the acceleration MLP, D -> P -> 2 P -> P -> D with SiLU between.
        scale_limit: bound of |scale|; None for none. Official runs with alignment have 5, which keeps half precision
            from overflowing; the others have none.
    """

    def __init__(self, dim: int, heads: int, hidden: int, scale_limit: float | None = None) -> None:
        super().__init__()
        self.scale_limit = scale_limit
        self.acceleration_mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * hidden),
            nn.SiLU(),
            nn.Linear(2 * hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )
        self.modulation = Modulation(2 * dim, 2)
        self.mlp = MLP(2 * dim, 2 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(
        self, h: Float[Tensor, "b n d"], x: Float[Tensor, "b n d"], gap: Float[Tensor, "b d2"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
        """Acceleration features A and refined tokens, from features, embedded input and embedded time gap."""
        acceleration = self.acceleration_mlp(h)
        shift, scale = self.modulation(gap)
        if self.scale_limit is not None:
            scale = scale.clamp(-self.scale_limit, self.scale_limit)
        refined = self.norm(self.mlp(modulate(torch.cat([h, acceleration], -1), shift, scale)))
        query = self.norm(x)
        attended, _ = self.attention(query, refined, refined, need_weights=False)
        return acceleration, query + attended
