"""Attention over the positions of a feature map, alone or with a context (LDM's spatial transformer)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.attention import Attending, SelfAttention
from repalign.nn.conv_blocks import group_norm
from repalign.nn.init import zero_


class SpatialSelfAttention(nn.Module):
    """x + attention(norm(x)) over all positions, without a context (ADM, LDM); its last layer begins at zero.

    Args:
        channels: C.
        heads: number of heads.
        groups: of the group norm.
    """

    def __init__(self, channels: int, heads: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.attention = SelfAttention(channels, heads)
        zero_(self.attention.proj)

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        tokens = self.attention(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class CrossAttention(Attending):
    """softmax(q k^T / sqrt(head_dim)) v with queries of x and keys and values of a context, of x itself without one.

    Queries, keys and values have no bias, the projection has one (LDM). All tokens of a context are attended to, its
    padding too, as LDM and Stable Diffusion do.

    Args:
        dim: width D of x.
        context_dim: width of the context.
        heads: number of heads; must divide ``dim``.
    """

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"backbone.heads: {heads} heads do not divide the width {dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(context_dim, dim, bias=False)
        self.v = nn.Linear(context_dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m k"] | None = None
    ) -> Float[Tensor, "b n d"]:
        source = x if context is None else context.to(x.dtype)
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=self.heads)
            for part in (self.q(x), self.k(source), self.v(source))
        )
        return self.proj(self.attend(q, k, v))


class GatedMLP(nn.Module):
    """linear(a * gelu(b)) with [a, b] = linear(x), 4 D wide each (GEGLU, arXiv:2002.05202; the exact GELU)."""

    def __init__(self, dim: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.gelu(gate))


class ContextBlock(nn.Module):
    """Self-attention, attention to the context, gated MLP, each added to the stream behind a LayerNorm (LDM)."""

    def __init__(self, dim: int, context_dim: int | None, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = CrossAttention(dim, dim, heads)
        self.cross_attention = CrossAttention(dim, context_dim or dim, heads)
        self.mlp = GatedMLP(dim)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m k"] | None = None
    ) -> Float[Tensor, "b n d"]:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map with attention to a context (LDM, arXiv:2112.10752, section 3.3).

    x + linear(blocks(linear(norm(x)))), the last linear layer beginning at zero. LDM's 1x1 convolutions are linear
    layers here. Without a context the second attention of a block is one more self-attention.

    Args:
        channels: C, also the width of the tokens.
        context_dim: width of the context; None without one.
        heads: number of heads.
        depth: number of blocks.
        groups: of the group norm, eps 1e-6.
    """

    def __init__(self, channels: int, context_dim: int | None, heads: int, depth: int = 1, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(ContextBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)
        zero_(self.proj_out)

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m k"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            tokens = block(tokens, context)
        return x + rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2])
