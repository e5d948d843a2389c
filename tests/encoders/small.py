"""Tiny twins of the cards."""

from __future__ import annotations

import torch

from repalign.encoders.vit import ViTEncoder

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def small(card: str, image_size: int = 32, weights: str = "random", **options) -> ViTEncoder:
    architecture = {**SMALL, **options.pop("architecture", {})}
    return ViTEncoder(card, image_size, weights, architecture=architecture, **options)


def stirred(card: str, image_size: int = 32, **options) -> ViTEncoder:
    """A tiny twin whose every tensor is random: an untrained one has zeros and ones that would hide a mistake."""
    encoder = small(card, image_size, **options)
    generator = torch.Generator().manual_seed(len(card))
    for parameter in encoder.network.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return encoder
