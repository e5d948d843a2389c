"""Who computes softmax(q k^T / sqrt(d)) v: PyTorch's fused attention, FlexAttention or xformers, behind one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from repalign.errors import UserError


@dataclass(frozen=True)
class Packing:
    """Sequences of different lengths one after another in a single row: tokens see those of their own sequence alone.

    It takes the place of an attention mask. What acts token by token needs nothing else, so a block gives each packed
    sequence what it would give it alone.

    Attributes:
        lengths: number of tokens N_s of each sequence; the row has their sum.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Float[Tensor, "_ d"]]) -> tuple[Float[Tensor, "1 n d"], Packing]:
        """The row of some sequences [N_s, D], and how it is made up."""
        return torch.cat(list(sequences)).unsqueeze(0), cls(tuple(len(x) for x in sequences))

    def split(self, row: Float[Tensor, "1 n d"]) -> list[Float[Tensor, "_ d"]]:
        """The sequences of a row."""
        return list(row[0].split(list(self.lengths)))

    def spread(self, vectors: Float[Tensor, "s d"]) -> Float[Tensor, "1 n d"]:
        """A vector of each sequence (its condition) for every token of it."""
        return vectors[self.numbers(vectors.device)].unsqueeze(0)

    def numbers(self, device: torch.device | str = "cpu") -> Int[Tensor, " n"]:
        """The sequence of each token, 0 .. S - 1."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    def mask(self, device: torch.device | str = "cpu") -> Bool[Tensor, "1 1 n n"]:
        """The same as a mask: block-diagonal."""
        numbers = self.numbers(device)
        return (numbers[:, None] == numbers[None])[None, None]


# True where a query may see a key, or numbers that are added to the scores; [B, 1 or heads, 1 or N, M].
Mask = Tensor | Packing | None


class Backend(Protocol):
    """Queries [B, heads, N, d], keys and values [B, heads, M, d] of one dtype -> [B, heads, N, d]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """PyTorch's scaled_dot_product_attention, on every device; packed sequences are computed one by one."""
    if isinstance(mask, Packing):
        parts = zip(*(x.split(list(mask.lengths), dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Flex:
    """PyTorch's FlexAttention: a kernel is compiled for the mask, and blocks that a mask hides are not computed.

    On a GPU it is compiled at its first call, or with the network. On a CPU it is PyTorch's reference, which is slow
    and has no backward pass: there it is for comparing.

    Raises:
        UserError: when a gradient is asked for on a CPU.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise UserError("attention: flex has no backward pass on a CPU; set attention=sdpa, or train on a GPU")
        options: dict[str, Any] = {}
        if isinstance(mask, Packing):
            options["block_mask"] = _packed(mask, q.device)
        elif mask is not None and mask.dtype == torch.bool:
            options["block_mask"] = _visible(mask, q, k)
        elif mask is not None:
            bias = mask.expand(-1, -1, q.shape[2], -1)
            heads = 0 if mask.shape[1] == 1 else 1
            options["score_mod"] = lambda score, b, h, i, j: score + bias[b, h * heads, i, j]
        return _flex_of(q.device.type)(q, k, v, **options)


def _visible(mask: Tensor, q: Tensor, k: Tensor) -> BlockMask:
    whole, heads = mask.expand(len(q), -1, q.shape[2], k.shape[2]), mask.shape[1]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return whole[b, h if heads > 1 else 0, i, j]

    return create_block_mask(seen, len(q), heads if heads > 1 else None, q.shape[2], k.shape[2], device=str(q.device))


@lru_cache(maxsize=64)
def _packed(packing: Packing, device: torch.device) -> BlockMask:
    numbers, n = packing.numbers(device), sum(packing.lengths)
    return create_block_mask(lambda b, h, i, j: numbers[i] == numbers[j], None, None, n, n, device=str(device))


@cache
def _flex_of(kind: str) -> Any:
    return _reference if kind == "cpu" else torch.compile(flex_attention)


def _reference(*args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():  # that it is slow is said above
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*args, **options)


class XFormers:
    """xformers' memory_efficient_attention (extra ``xformers``), on GPUs alone; packed sequences are one kernel.

    Raises:
        UserError: when the package is missing or does not load beside this PyTorch; at a call, on a CPU.
    """

    def __init__(self) -> None:
        try:
            self.ops: Any = import_module("xformers.ops")
            self.masks: Any = import_module("xformers.ops.fmha.attn_bias")
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"attention: xformers does not load ({type(error).__name__}: {str(error).splitlines()[0]}); install "
                "the extra (uv pip install 'repalign[xformers]'), or set attention=sdpa"
            ) from error

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        if q.device.type == "cpu":
            raise UserError("attention: xformers has no kernel for a CPU; set attention=sdpa, or train on a GPU")
        found = self.ops.memory_efficient_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=self.bias(mask, q, k)
        )
        return found.transpose(1, 2)

    def bias(self, mask: Mask, q: Tensor, k: Tensor) -> Any:
        """The mask as xformers takes it: block-diagonal by lengths, or numbers [B, heads, N, M] that are added."""
        if mask is None:
            return None
        if isinstance(mask, Packing):
            return self.masks.BlockDiagonalMask.from_seqlens(list(mask.lengths))
        return padded_bias(mask, q, k)


def padded_bias(mask: Tensor, q: Tensor, k: Tensor) -> Float[Tensor, "b h n m"]:
    """A mask as numbers to be added, its rows stored with a multiple of 8 numbers as xformers' kernels want them."""
    (batch, heads, n, _), m = q.shape, k.shape[2]
    wide = q.new_zeros(batch, heads, n, -(-m // 8) * 8)[..., :m]
    if mask.dtype == torch.bool:
        return wide.masked_fill_(~mask, float("-inf"))
    return wide.copy_(mask.expand_as(wide))
