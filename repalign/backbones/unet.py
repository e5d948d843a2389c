"""The convolutional U-Net of latent diffusion."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.errors import UserError
from repalign.nn.conv_blocks import ConvDown, ConvUp, ResBlock, conv3x3, group_norm
from repalign.nn.embed import TimeEmbedding
from repalign.nn.init import zero_
from repalign.nn.spatial_attention import SpatialSelfAttention, SpatialTransformer
from repalign.nn.unet_block import UNetBlock
from repalign.state import Cond, Output, Tokens, TokenSpec


class UNet(nn.Module):
    """U-Net of residual blocks and attention with skip connections (ADM, arXiv:2105.05233; LDM, arXiv:2112.10752).

    ``depth`` blocks per level on the way down, the side halved between levels; two blocks with attention between in the
    middle; ``depth`` + 1 blocks per level on the way up, each reading the concatenation with the output of its partner
    on the way down (the stem's and the halvings' too). All blocks are modulated by embed(t), plus embed(label) if
    ``label``. A text attends through spatial transformers (``Cond.text``), a map joins the input's channels
    (``Cond.spatial``); with both the conditioning is LDM's "hybrid". Taps: ``down.k`` and ``up.k`` after the k-th block
    of the way down and up (attention included), ``mid`` after the middle.

    The network is convolutional: states of another size than ``latent_shape`` are taken as they come, as long as both
    sides are multiples of ``side_multiple`` (a tap then has the grid of its state). The time is embedded as it comes;
    LDM feeds integer steps (:class:`repalign.backbones.clocks.StepClock`).

    Args:
        latent_shape: (C, H, W) of the state.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        dim: channels of the first level (LDM: model_channels).
        multipliers: channels of each level over ``dim``.
        depth: residual blocks per level of the way down.
        attention: down-sampling factors (1, 2, 4, ...) of the levels with attention, not pixel sizes.
        heads: number of heads of every attention.
        head_dim: channels per head, instead of ``heads``.
        transformer_depth: blocks of each spatial transformer; 0 for attention without a context (ADM's).
        label: add an embedding of the label to that of the time (LDM's "adm").
        context_dim: width of the context's tokens; None when there is no context.
        concat_channels: channels of the map that joins the state; 0 for none.
        groups: of all group norms.
        scale_shift: how blocks are modulated, see :class:`repalign.nn.conv_blocks.ResBlock`.
        residual_resampling: halve and double by residual blocks instead of convolutions.
        dropout: probability inside the residual blocks.
        variance_head: predict C more channels, given as ``Output.heads["variance"]``.

    Attributes:
        side_multiple: 2^(levels - 1).

    Raises:
        UserError: for several streams, an attention factor that no level has, both or neither of heads and head_dim, a
            context without transformers, sides that cannot be halved often enough; at a call, when a condition that the
            network was made for is missing.
        ValueError: when groups or heads do not divide a number of channels.
    """

    uses_carry = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        dim: int,
        multipliers: Sequence[int],
        depth: int,
        attention: Sequence[int],
        heads: int | None = None,
        head_dim: int | None = None,
        transformer_depth: int = 0,
        label: bool = False,
        context_dim: int | None = None,
        concat_channels: int = 0,
        groups: int = 32,
        scale_shift: bool = False,
        residual_resampling: bool = False,
        dropout: float = 0.0,
        variance_head: bool = False,
    ) -> None:
        super().__init__()
        _check(latent_shape, multipliers, attention, heads, head_dim, transformer_depth, context_dim)
        channels, height, width = latent_shape
        self.channels = channels
        self.depth = depth
        self.heads = heads
        self.head_dim = head_dim
        self.context_dim = context_dim
        self.concat_channels = concat_channels
        self.variance_head = variance_head
        self.side_multiple = 2 ** (len(multipliers) - 1)
        self._check_sides(height, width)
        widths = [factor * dim for factor in multipliers]
        cond_dim = 4 * dim
        residual = partial(ResBlock, cond_dim=cond_dim, groups=groups, scale_shift=scale_shift, dropout=dropout)

        def attend(size: int) -> nn.Module:
            if transformer_depth:
                return SpatialTransformer(size, context_dim, self.heads_of(size), transformer_depth, groups)
            return SpatialSelfAttention(size, self.heads_of(size), groups)

        def block(size: int, out: int, level: int) -> UNetBlock:
            return UNetBlock(residual(size, out), attend(out) if 2**level in attention else None)

        self.time_embed = TimeEmbedding(cond_dim, frequencies=dim)
        self.label_embed = nn.Embedding(num_classes + 1, cond_dim) if label else None
        self.stem = conv3x3(channels + concat_channels, dim)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.halvings, self.doublings = nn.ModuleList(), nn.ModuleList()
        size, skips, last = dim, [dim], len(widths) - 1
        for level, out in enumerate(widths):
            for _ in range(depth):
                self.down.append(block(size, out, level))
                size = out
                skips.append(size)
            if level < last:
                self.halvings.append(residual(size, size, resample="down") if residual_resampling else ConvDown(size))
                skips.append(size)
        self.middle = nn.ModuleList(
            [UNetBlock(residual(size, size), attend(size)), UNetBlock(residual(size, size), None)]
        )
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(block(size + skips.pop(), out, level))
                size = out
            if level > 0:
                self.doublings.append(residual(size, size, resample="up") if residual_resampling else ConvUp(size))
        self.out_norm = group_norm(size, groups)
        self.out = conv3x3(size, 2 * channels if variance_head else channels)
        zero_(self.out)

        specs = [TokenSpec(out, (height // 2**level, width // 2**level)) for level, out in enumerate(widths)]
        down = [spec for spec in specs for _ in range(depth)]
        up = [spec for spec in reversed(specs) for _ in range(depth + 1)]
        self.tap_specs: Mapping[str, TokenSpec] = {
            **{f"down.{k}": spec for k, spec in enumerate(down, start=1)},
            "mid": specs[-1],
            **{f"up.{k}": spec for k, spec in enumerate(up, start=1)},
        }

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.down, *self.middle, *self.up]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Predict from the noisy latent; see the protocol ``Backbone``."""
        collector = TapCollector(taps, self.tap_specs)
        self._check_sides(*x_t.shape[2:])
        c = self.time_embed(t)
        if self.label_embed is not None:
            c = c + self.label_embed(cond.label)
        context = self._context(cond)

        h = self.stem(self._with_map(x_t, cond))
        skips = [h]
        for k, block in enumerate(self.down, start=1):
            h = block(h, c, context)
            skips.append(h)
            collector.offer(f"down.{k}", _tokens(h))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
            if k % self.depth == 0 and k < len(self.down):
                h = self.halvings[k // self.depth - 1](h, c)
                skips.append(h)
        for block in self.middle:
            h = block(h, c, context)
        collector.offer("mid", _tokens(h))
        if only_taps and collector.complete:
            return Output(taps=collector.found)
        for k, block in enumerate(self.up, start=1):
            h = block(torch.cat([h, skips.pop()], 1), c, context)
            collector.offer(f"up.{k}", _tokens(h))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
            if k % (self.depth + 1) == 0 and k < len(self.up):
                h = self.doublings[k // (self.depth + 1) - 1](h, c)
        out = self.out(F.silu(self.out_norm(h)))
        if not self.variance_head:
            return Output(out, {}, collector.found)
        pred, variance = out.chunk(2, dim=1)
        return Output(pred, {"variance": variance}, collector.found)

    def heads_of(self, channels: int) -> int:
        """Number of heads of an attention over so many channels."""
        return self.heads if self.head_dim is None else channels // self.head_dim  # type: ignore[return-value]

    def _context(self, cond: Cond) -> Tensor | None:
        if self.context_dim is None:
            return None
        if cond.text is None:
            raise UserError("backbone: attends to a context, but there is none; set conditioner=text or label_token")
        return cond.text.data

    def _with_map(self, x_t: Tensor, cond: Cond) -> Tensor:
        if not self.concat_channels:
            return x_t
        found = None if cond.spatial is None else tuple(cond.spatial.shape[1:])
        if cond.spatial is None or found != (self.concat_channels, *x_t.shape[2:]):
            expected = " x ".join(map(str, (self.concat_channels, *x_t.shape[2:])))
            raise UserError(f"backbone: expected a map of {expected} beside the state, found {found or 'none'}")
        return torch.cat([x_t, cond.spatial.to(x_t.dtype)], 1)

    def _check_sides(self, height: int, width: int) -> None:
        if height % self.side_multiple or width % self.side_multiple:
            raise UserError(
                f"backbone.multipliers: a latent of {height} x {width} cannot be halved "
                f"{self.side_multiple.bit_length() - 1} times; both sides must be multiples of {self.side_multiple}"
            )


def _tokens(h: Float[Tensor, "b c h w"]) -> Tokens:
    return Tokens(rearrange(h, "b c h w -> b (h w) c"), (h.shape[2], h.shape[3]))


def _check(
    latent_shape: Any,
    multipliers: Sequence[int],
    attention: Sequence[int],
    heads: int | None,
    head_dim: int | None,
    transformer_depth: int,
    context_dim: int | None,
) -> None:
    if isinstance(latent_shape, Mapping):
        raise UserError("backbone: a U-Net denoises one stream; set streams=none, or a transformer backbone")
    factors = [2**level for level in range(len(multipliers))]
    if not set(attention) <= set(factors):
        raise UserError(f"backbone.attention: found {list(attention)}; the levels are down-sampled by {factors}")
    if (heads is None) == (head_dim is None):
        raise UserError(f"backbone: expected one of heads and head_dim, found heads={heads}, head_dim={head_dim}")
    if context_dim is not None and not transformer_depth:
        raise UserError(
            "backbone.transformer_depth: 0, so the condition's tokens would not be read; set 1 or more, or another "
            "conditioner"
        )
