"""Multi-head attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repalign.nn.attention_backends import Backend, Mask, Packing, sdpa
from repalign.nn.norm import RMSNorm


class Attending(nn.Module):
    """A layer that attends, by a backend that can be exchanged (:func:`repalign.training.policies.attend_by`).

    The backend has no weights and is no part of a state dict.
    """

    backend: Backend = staticmethod(sdpa)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Float[Tensor, "b n d"]:
        """Attention over heads [B, heads, N, head_dim], the heads joined afterwards."""
        # A norm runs in float32 under autocast; attention wants one precision for all three.
        return rearrange(self.backend(q.to(v.dtype), k.to(v.dtype), v, mask), "b h n d -> b n (h d)")


class SelfAttention(Attending):
    """softmax(q k^T / sqrt(head_dim)) v with one fused projection (q, then k, then v) and optional query-key norm.

    Args:
        dim: width D.
        heads: number of heads; must divide ``dim``.
        qk_norm: normalise every head's queries and keys.
        norm: makes that norm from the head width; LayerNorm is affine with eps 1e-5.
        qkv_bias: whether the fused projection has a bias.
        output: whether there is a projection of the result; without one a sequence is read by others alone.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_norm: bool = False,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        qkv_bias: bool = True,
        output: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention: {heads} heads do not divide the width {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = norm(dim // heads) if qk_norm else nn.Identity()
        if output:
            self.proj = nn.Linear(dim, dim)

    def heads_of(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, N, head_dim], the first two normalised."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.q_norm(q), self.k_norm(k), v

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b 1 n n"] | Packing | None = None,
        rotary: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend.

        Args:
            x: tokens.
            mask: query i sees key j only if mask[..., i, j] is true, or if both are of one packed sequence; None for
                all.
            rotary: turns queries and keys [B, heads, N, head_dim] by their positions, after the norm.
        """
        q, k, v = self.heads_of(x)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.proj(self.attend(q, k, v, mask))


class CrossAttention(Attending):
    """softmax(q k^T / sqrt(head_dim)) v with queries from one sequence, keys and values from another, all with bias.

    Args:
        dim: width D of both sequences.
        heads: number of heads; must divide ``dim``.
        qk_norm: RMS-normalise every head's queries and keys.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention: {heads} heads do not divide the width {dim}")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n d"], text: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Attend; ``mask`` is true at the keys that may be seen. Where it hides all of them, they count alike."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(text), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        bias = None
        if mask is not None:
            # Finite, so that a caption without a visible token gives no NaN (PixArt-alpha).
            bias = torch.where(mask, 0.0, -10000.0).to(v.dtype)[:, None, None]
        return self.proj(self.attend(self.q_norm(q), self.k_norm(k), v, bias))


def same_group(groups: Int[Tensor, "b n"]) -> Bool[Tensor, "b 1 n n"]:
    """The attention mask under which tokens see those of their own group alone, for all heads."""
    return (groups.unsqueeze(2) == groups.unsqueeze(1)).unsqueeze(1)
