"""What metrics see of a picture: the features and logits of a frozen network."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repalign.errors import unknown_choice

# How a value p in [0, 1] becomes a byte: what is added to 255 p before the fraction is dropped.
ROUNDING = {"round": 0.5, "truncate": 0.0}


class Features(NamedTuple):
    """What a network sees of pictures.

    Attributes:
        pooled: [B, D].
        logits: [B, K] of a classifier, or None.
        spatial: [B, S], a flattened map of an early layer, or None.
        text: [B, D] of the pictures' captions, in the space of ``pooled``, or None.
    """

    pooled: Float[Tensor, "b d"]
    logits: Float[Tensor, "b k"] | None = None
    spatial: Float[Tensor, "b s"] | None = None
    text: Float[Tensor, "b d"] | None = None


class FeatureNetwork(Protocol):
    """A frozen network; ``fingerprint`` changes with its weights and its preprocessing."""

    fingerprint: str

    def __call__(self, images: Tensor) -> tuple[Any, ...]: ...  # [B, 3, H, W] in [0, 1] -> Features
    def to(self, device: torch.device) -> FeatureNetwork: ...


def to_uint8(images: Float[Tensor, "b 3 h w"], rounding: str = "round") -> UInt8[Tensor, "b 3 h w"]:
    """Pictures in [0, 1] as bytes.

    Args:
        images: values outside [0, 1] are clamped.
        rounding: ``round`` = floor(255 p + 1/2), what DiT and SiT write as 127.5 x + 128 with x = 2 p - 1;
            ``truncate`` = floor(255 p), REPA's 255 (x + 1) / 2. Numbers of one paper are to be repeated with its own.

    Raises:
        UserError: for another rounding.
    """
    if rounding not in ROUNDING:
        raise unknown_choice("rounding", rounding, ROUNDING)
    return (images.float() * 255 + ROUNDING[rounding]).clamp(0, 255).to(torch.uint8)
