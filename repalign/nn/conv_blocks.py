"""Convolutional blocks of diffusion U-Nets (ADM, LDM): residual blocks with a time vector, resampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.init import zero_


def group_norm(channels: int, groups: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Group norm with affine parameters; under autocast PyTorch computes it in float32, as the official codes do.

    Raises:
        ValueError: when the groups do not divide the channels.
    """
    if channels % groups:
        raise ValueError(f"backbone.groups: {groups} groups do not divide {channels} channels")
    return nn.GroupNorm(groups, channels, eps=eps)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _stay(x: Tensor) -> Tensor:
    return x


RESAMPLE: Mapping[str | None, Callable[[Tensor], Tensor]] = {None: _stay, "down": _halve, "up": _double}


class ResBlock(nn.Module):
    """x' + conv(dropout(silu(norm(h)))) with h = conv(silu(norm(x))) + linear(silu(c)) and x' = x, or a 1x1 conv of it.

    With ``scale_shift`` the vector modulates instead: norm(h) (1 + scale) + shift (ADM, LDM-8). With ``resample`` the
    block halves (2x2 mean) or doubles (nearest) the side, between activation and convolution and of x alike. The last
    convolution begins at zero.

    Args:
        in_channels, out_channels: C before and after.
        cond_dim: width of the vector c.
        groups: of both group norms.
        scale_shift: see above.
        dropout: probability.
        resample: ``up``, ``down`` or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        groups: int = 32,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = RESAMPLE[resample]
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.cond = nn.Linear(cond_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        zero_(self.conv2)

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b e i j"]:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        vector = rearrange(self.cond(F.silu(c)), "b e -> b e 1 1").to(h.dtype)
        if self.scale_shift:
            scale, shift = vector.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + vector)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(F.silu(h)))


class ConvDown(nn.Module):
    """Half the side by a 3x3 convolution of stride 2; the vector is not used (one call for every resampling)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b c i j"]:
        return self.conv(x)


class ConvUp(nn.Module):
    """Twice the side, nearest, then a 3x3 convolution; the vector is not used (one call for every resampling)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b c i j"]:
        return self.conv(_double(x))
