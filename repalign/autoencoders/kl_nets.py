"""Convolutional encoder and decoder of the KL autoencoders of LDM, Stable Diffusion and SD3.

Sub-modules carry the names of the diffusers layout, so that the published files load without renaming.
Levels are counted from 0 = full resolution; every level but the last halves the side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, dim_in: int, dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps=1e-6)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, dim, eps=1e-6)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv_shortcut = nn.Identity() if dim_in == dim else nn.Conv2d(dim_in, dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """x + attention over the grid, one head of the full width, behind a group norm."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        tokens = rearrange(self.group_norm(x), "b d h w -> b 1 (h w) d")
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](mixed), "b 1 (h w) d -> b d h w", h=x.shape[2])


class Downsample(nn.Module):
    """3x3 convolution of stride 2; one zero row below and one zero column on the right, none on the other sides."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x 2, then a 3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, attention behind each if the level attends, then the resampling, if any."""

    def __init__(
        self,
        dims: Sequence[int],
        groups: int,
        attends: bool,
        down: Sequence[nn.Module] = (),
        up: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(dims[:-1], dims[1:], strict=True))
        self.attentions = nn.ModuleList(AttentionBlock(d, groups) for d in dims[1:] if attends)
        self.downsamplers = nn.ModuleList(down)
        self.upsamplers = nn.ModuleList(up)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(dim, groups)])

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class KLEncoder(nn.Module):
    """Pictures in [-1, 1] -> ``dim_out`` channels at 1 / 2^(levels - 1) of the side.

    Args:
        dim_out: channels of the result (twice the latent's for a posterior).
        widths: of each level, from full resolution down.
        depth: residual blocks per level.
        groups: of every group norm.
        attention_levels: levels with attention behind each residual block; the middle always attends.
    """

    def __init__(
        self, dim_out: int, widths: Sequence[int], depth: int, groups: int, attention_levels: Collection[int]
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            dims = [widths[max(level - 1, 0)], *[width] * depth]
            down = [Downsample(width)] if level < len(widths) - 1 else []
            self.down_blocks.append(Level(dims, groups, level in attention_levels, down=down))
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], dim_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d h2 w2"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class KLDecoder(nn.Module):
    """``dim_in`` channels -> pictures in [-1, 1]; the mirror of :class:`KLEncoder` with one more block per level."""

    def __init__(
        self, dim_in: int, widths: Sequence[int], depth: int, groups: int, attention_levels: Collection[int]
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(dim_in, widths[-1], 3, padding=1)
        self.mid_block = Middle(widths[-1], groups)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            dims = [widths[min(level + 1, len(widths) - 1)], *[width] * (depth + 1)]
            up = [Upsample(width)] if level > 0 else []
            self.up_blocks.append(Level(dims, groups, level in attention_levels, up=up))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
