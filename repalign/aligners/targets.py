"""What a tap is aligned with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from einops import rearrange

from repalign.errors import UserError, unknown_choice
from repalign.protocols import Context, Target
from repalign.state import Tokens, TokenSpec


class EncoderTarget:
    """Tokens of a frozen encoder on the clean image (REPA, arXiv:2410.06940).

    Args:
        encoder: name of the encoder among the configured ones (config key ``encoders.<name>``).

    Raises:
        UserError: when no encoder of that name is configured.
    """

    taps = ()

    def __init__(self, encoder: str = "main") -> None:
        self.encoder = encoder

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec:
        """Layout of the encoder's tokens."""
        if self.encoder not in features:
            raise unknown_choice("aligner.target.encoder", self.encoder, features, "encoder; choose one by encoder=...")
        return features[self.encoder]

    def __call__(self, context: Context) -> Tokens:
        tokens = context.features(self.encoder)
        return tokens.with_data(tokens.data.detach())


class BilinearTarget:
    """Another target's tokens, resampled bilinearly to the grid of a tap; prefix tokens are dropped (DDT).

    Pixel centres are aligned, not corners, and the kernel is not widened where the grid shrinks, which skips tokens at
    ratios above 2 (the aligner's own ``resize: target`` averages there). Equal grids pass unchanged.

    Args:
        target: whose tokens are resampled.
        tap: whose grid they get.

    Raises:
        UserError: for an unknown tap, or when the tap or the target has no grid.
    """

    def __init__(self, target: Target, tap: str) -> None:
        self.target = target
        self.tap = tap
        self.taps = tuple(getattr(target, "taps", ()))
        self.grid = (0, 0)

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec:
        """The target's width on the tap's grid."""
        if self.tap not in taps:
            raise unknown_choice("aligner.target.tap", self.tap, taps, "tap of this backbone")
        goal, grid = self.target.spec(taps, features), taps[self.tap].grid
        if goal.grid is None or grid is None:
            raise UserError(f"aligner.target: bilinear resampling needs two grids, tap '{self.tap}' and target")
        self.grid = grid
        return replace(goal, grid=grid, prefix=0)

    def __call__(self, context: Context) -> Tokens:
        tokens = self.target(context).patches
        if tokens.grid == self.grid or tokens.grid is None:
            return tokens
        image = rearrange(tokens.data, "b (h w) d -> b d h w", h=tokens.grid[0])
        image = F.interpolate(image, size=self.grid, mode="bilinear", align_corners=False)
        return Tokens(rearrange(image, "b d h w -> b (h w) d"), self.grid)


def unwrapped(target: Target) -> Target:
    """The target inside its resampling: what is aligned with, whatever its grid."""
    return target.target if isinstance(target, BilinearTarget) else target
