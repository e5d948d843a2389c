"""Embeddings for finding copies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.encoders.frozen import Frozen
from repalign.errors import UserError
from repalign.protocols import Encoder


class GridVector(Frozen):
    """The grid tokens of an encoder side by side: [B, 3, H, W] -> ([B, N D],).

    What is where counts, unlike in a mean over the tokens: two pictures with the same things in other places are no
    copies. For networks that were not trained to find copies this tells copies from relatives better.

    Args:
        encoder: with an attribute ``fingerprint``.

    Raises:
        UserError: when the encoder has no fingerprint.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        fingerprint = getattr(encoder, "fingerprint", None)
        if fingerprint is None:
            raise UserError(f"descriptor: {type(encoder).__name__} has no fingerprint to keep numbers by")
        self.encoder = encoder
        self.fingerprint = f"{fingerprint}-grid"

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"]]:
        """Vectors of pictures in [0, 1]."""
        tokens = self.encoder(images)
        return (tokens.data[:, tokens.prefix :].flatten(1).float(),)
