"""Layers of Cross-DiT: the block with cross-attention, and two ways to modulate it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repalign.nn.attention import CrossAttention, SelfAttention
from repalign.nn.blocks import MLP, Modulation, modulate, over_tokens
from repalign.nn.embed import TimeEmbedding, VectorEmbedding
from repalign.nn.init import zero_
from repalign.nn.norm import RMSNorm
from repalign.state import Cond

Vectors = tuple[Tensor, ...]  # shift, scale, gate of the self-attention, then of the MLP, each [B, D]


class CrossBlock(nn.Module):
    """Gated self-attention, cross-attention to the text without a gate, gated MLP (PixArt-alpha, arXiv:2310.00426).

    Args:
        dim: width D.
        heads: number of heads of both attentions.
        mlp_ratio: hidden width of the MLP over D.
        qk_norm: RMS-normalise queries and keys of each head.
        cross_norm: LayerNorm without parameters before the cross-attention; PixArt has none.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool, cross_norm: bool) -> None:
        super().__init__()
        self.cross_norm = cross_norm
        self.attention = SelfAttention(dim, heads, qk_norm, norm=RMSNorm)
        self.cross_attention = CrossAttention(dim, heads, qk_norm)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b m d"],
        vectors: Vectors,
        mask: Bool[Tensor, "b m"] | None,
    ) -> Float[Tensor, "b n d"]:
        """The tokens after the block; ``mask`` is true at text tokens that may be seen."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        x = x + over_tokens(gate_a) * self.attention(modulate(x, shift_a, scale_a))
        query = F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.cross_norm else x
        x = x + self.cross_attention(query, text, mask)
        return x + over_tokens(gate_m) * self.mlp(modulate(x, shift_m, scale_m))


class BlockModulation(Protocol):
    """Makes the vectors that modulate all blocks and the last norm (an ``nn.Module``)."""

    def reset_parameters(self) -> None: ...
    def __call__(self, t: Float[Tensor, " b"], cond: Cond) -> tuple[list[Vectors], Vectors]: ...


class SharedModulation(nn.Module):
    """adaLN-single: one linear layer for all blocks, and a learned offset for each (PixArt-alpha).

    e = embed(t) (+ embed(size)); T = linear(silu(e)) in [6, D]; block i takes table_i + T, the last norm table + e.

    Args:
        dim: width D.
        depth: number of blocks.
        pooled_dim: width of a pooled text vector, which this way does not read.
        size: add embeddings of height, width and aspect ratio from ``cond.size`` (PixArt-alpha at 1024 pixels).
    """

    def __init__(self, dim: int, depth: int, pooled_dim: int | None, size: bool = False) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(dim)
        self.size_embed = SizeEmbedding(dim) if size else None
        self.linear = nn.Linear(dim, 6 * dim)
        self.tables = nn.Parameter(torch.empty(depth, 6, dim))
        self.final_table = nn.Parameter(torch.empty(2, dim))

    def reset_parameters(self) -> None:
        """N(0, 0.02) in the embeddings and the shared layer, N(0, 1 / D) in the tables."""
        nn.init.normal_(self.linear.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, TimeEmbedding):
                for layer in part.linears:
                    nn.init.normal_(layer.weight, std=0.02)
        for table in (self.tables, self.final_table):
            nn.init.normal_(table, std=1 / math.sqrt(table.shape[-1]))

    def embed(self, t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b d"]:
        """e: time, and size where it is embedded."""
        e = self.time_embed(t)
        if self.size_embed is None:
            return e
        assert cond.size is not None, "height, width and aspect ratio"
        return e + self.size_embed(cond.size)

    def shared(self, e: Float[Tensor, "b d"]) -> Float[Tensor, "b six d"]:
        """T: what all blocks have in common."""
        return self.linear(F.silu(e)).unflatten(-1, (6, -1))

    def forward(self, t: Float[Tensor, " b"], cond: Cond) -> tuple[list[Vectors], Vectors]:
        e = self.embed(t, cond)
        common = self.shared(e)
        return [(table + common).unbind(1) for table in self.tables], (self.final_table + e.unsqueeze(1)).unbind(1)


class PooledModulation(nn.Module):
    """adaLN-Zero with a layer for each block; c = embed(t) + embed(pooled text), as in SD3's ablation.

    The paper (arXiv:2403.03206, section 5.2) names the baseline and publishes no code: the details are this project's.

    Args:
        dim: width D.
        depth: number of blocks.
        pooled_dim: width of the pooled text vector.

    Raises:
        ValueError: without a pooled vector.
    """

    def __init__(self, dim: int, depth: int, pooled_dim: int | None) -> None:
        super().__init__()
        if pooled_dim is None:
            raise ValueError("modulation: needs a pooled text vector, and the conditioner gives none")
        self.time_embed = TimeEmbedding(dim)
        self.pooled_embed = VectorEmbedding(pooled_dim, dim)
        self.blocks = nn.ModuleList(Modulation(dim, 6) for _ in range(depth))
        self.final = Modulation(dim, 2)

    def reset_parameters(self) -> None:
        """N(0, 0.02) in the embeddings, zero modulations."""
        for layer in (*self.time_embed.linears, *self.pooled_embed.linears):
            nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                zero_(part.linear)

    def forward(self, t: Float[Tensor, " b"], cond: Cond) -> tuple[list[Vectors], Vectors]:
        assert cond.pooled is not None, "a pooled text vector"
        c = self.time_embed(t) + self.pooled_embed(cond.pooled)
        return [block(c) for block in self.blocks], self.final(c)


class SizeEmbedding(nn.Module):
    """Height, width and aspect ratio, each by a sinusoid and an MLP of D / 3, side by side: [B, 3] -> [B, D].

    Height and width share their MLP. Raises ValueError when D is no multiple of 3.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 3:
            raise ValueError(f"size embedding: the width {dim} is no multiple of 3")
        self.resolution = TimeEmbedding(dim // 3)
        self.aspect = TimeEmbedding(dim // 3)

    def forward(self, size: Float[Tensor, "b 3"]) -> Float[Tensor, "b d"]:
        return torch.cat([self.resolution(size[:, :2]).flatten(1), self.aspect(size[:, 2])], 1)
