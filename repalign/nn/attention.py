"""Multi-head self-attention."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v with one fused projection (q, then k, then v) and optional query-key norm.

    Args:
        dim: width D.
        heads: number of heads; must divide ``dim``.
        qk_norm: normalise every head's queries and keys.
        norm: makes that norm from the head width; LayerNorm is affine with eps 1e-5.
        qkv_bias: whether the fused projection has a bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_norm: bool = False,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention: {heads} heads do not divide the width {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b 1 n n"] | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend.

        Args:
            x: tokens.
            mask: query i sees key j only if mask[..., i, j] is true; None for all.
            rotary: turns queries and keys [B, heads, N, head_dim] by their positions, after the norm.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        # The norm runs in float32 under autocast; attention wants one precision for all three.
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))


def same_group(groups: Int[Tensor, "b n"]) -> Bool[Tensor, "b 1 n n"]:
    """The attention mask under which tokens see those of their own group alone, for all heads."""
    return (groups.unsqueeze(2) == groups.unsqueeze(1)).unsqueeze(1)
