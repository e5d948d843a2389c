"""Transformer blocks with adaptive layer norm."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repalign.nn.attention import SelfAttention
from repalign.nn.attention_backends import Packing


def over_tokens(vectors: Tensor) -> Float[Tensor, "b m d"]:
    """One vector per sample, [B, D], as [B, 1, D]; one per token, [B, N, D], as it is."""
    return vectors.unsqueeze(1) if vectors.ndim == 2 else vectors


def modulate(x: Float[Tensor, "b n d"], shift: Tensor, scale: Tensor) -> Float[Tensor, "b n d"]:
    """LayerNorm without parameters (eps 1e-6), then x (1 + scale) + shift, per sample [B, D] or token [B, N, D]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + over_tokens(scale)) + over_tokens(shift)


class Modulation(nn.Module):
    """SiLU and a linear layer from the condition to ``count`` vectors of the block's width (adaLN)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, c: Float[Tensor, "*b d"]) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c)).chunk(self.count, dim=-1)


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), linear; ``out_dim`` is ``dim`` unless it is given."""

    def __init__(self, dim: int, hidden: int, out_dim: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out_dim or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """adaLN-Zero block: gated attention and gated MLP, each behind a modulated norm (DiT, arXiv:2212.09748, Fig. 3).

    The six modulation vectors come in the order shift, scale, gate of the attention, then of the MLP.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.attention = SelfAttention(dim, heads, qk_norm)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        c: Float[Tensor, "*b d"],
        mask: Bool[Tensor, "b 1 n n"] | Packing | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Modulated by c, one for a sample [B, D] or for each token [B, N, D]; ``mask`` is the attention's."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = x + over_tokens(gate_a) * self.attention(modulate(x, shift_a, scale_a), mask)
        return x + over_tokens(gate_m) * self.mlp(modulate(x, shift_m, scale_m))
