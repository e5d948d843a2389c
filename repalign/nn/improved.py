"""Layers of the improved diffusion transformer: SwiGLU, RMSNorm, rotary positions, modulation token by token.

Source: DDT (arXiv:2504.05741), whose baseline "improved DiT" and both halves are made of them.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.attention import SelfAttention
from repalign.nn.norm import RMSNorm
from repalign.nn.rotary import Rotary2d


class LinearModulation(nn.Module):
    """A linear layer from the condition to ``count`` vectors of the width; the condition comes activated already.

    The condition is [B, M, D] with M = 1 for the whole sample or M = N for one per token (token-wise adaLN).
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, c: Float[Tensor, "b m d"]) -> tuple[Tensor, ...]:
        return self.linear(c).chunk(self.count, dim=-1)


def shift_scale(x: Float[Tensor, "b n d"], shift: Float[Tensor, "b m d"], scale: Float[Tensor, "b m d"]) -> Tensor:
    """X (1 + scale) + shift, with one shift and scale per sample (M = 1) or per token (M = N)."""
    return x * (1 + scale) + shift


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) without biases (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ImprovedBlock(nn.Module):
    """Gated attention and gated SwiGLU, each behind a modulated RMSNorm; SwiGLU's hidden width is 8/3 of D.

    The six modulation vectors come in the order shift, scale, gate of the attention, then of the SwiGLU.

    Args:
        dim: width D.
        heads: number of heads; queries and keys are RMS-normalised per head, then turned by ``rotary``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.modulation = LinearModulation(dim, 6)
        self.norm1 = RMSNorm(dim)
        self.attention = SelfAttention(dim, heads, qk_norm=True, norm=RMSNorm, qkv_bias=False)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, 8 * dim // 3)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b m d"], rotary: Rotary2d) -> Float[Tensor, "b n d"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = x + gate_a * self.attention(shift_scale(self.norm1(x), shift_a, scale_a), rotary=rotary)
        return x + gate_m * self.mlp(shift_scale(self.norm2(x), shift_m, scale_m))


class ModulatedNorm(nn.Module):
    """LayerNorm without parameters (eps 1e-6), then a shift and a scale from the condition: before the last linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = LinearModulation(dim, 2)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        shift, scale = self.modulation(c)
        return shift_scale(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)
