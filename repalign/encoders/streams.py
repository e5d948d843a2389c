"""Streams that are diffused beside the latent (protocol ``StreamSource``), made from an encoder's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.encoders.pca import PCA
from repalign.errors import UserError, unknown_choice
from repalign.protocols import StreamSource
from repalign.state import LATENT, StateShape, Tokens, TokenSpec


def state_shape(latent_shape: tuple[int, int, int], streams: Mapping[str, StreamSource]) -> StateShape:
    """Shape of x_0: that of the latent alone, or of the latent and every further stream by name.

    Raises:
        UserError: when a stream is called like the latent.
    """
    if LATENT in streams:
        raise UserError(f"streams.{LATENT}: this name is the autoencoder's; choose another one")
    return (
        {LATENT: latent_shape, **{name: source.shape for name, source in streams.items()}} if streams else latent_shape
    )


class ClassToken:
    """The class token as the encoder gives it, [B, E], neither rescaled nor centred (REG, arXiv:2507.01467).

    Args:
        encoder: name of the encoder (config key ``encoders.<name>``).
        features: token layout of every encoder, by name.
        latent_shape: not needed, a vector has no size in space.

    Raises:
        UserError: when there is no such encoder or it has no class token.
    """

    def __init__(
        self, encoder: str = "main", *, features: Mapping[str, TokenSpec], latent_shape: tuple[int, int, int]
    ) -> None:
        spec = _spec_of(encoder, features)
        if spec.prefix < 1:
            raise UserError(
                f"streams: encoder '{encoder}' gives no class token; set encoders.{encoder}.class_token=true, or "
                "choose an encoder that has one"
            )
        self.encoder = encoder
        self.shape = (spec.dim,)

    def __call__(self, tokens: Tokens) -> Float[Tensor, "b e"]:
        return tokens.data[:, 0]


class PCAFeatures(nn.Module):
    """The first principal components of the patch tokens as a map of the latent's size, [B, R, H, W] (ReDi).

    Scores are not rescaled: their standard deviations are 3.6 to 5.8 for DINOv2-B, so at the same time they stand
    further out of the noise than the latent does. Tokens on a coarser grid are upsampled bilinearly.

    Source: arXiv:2504.16064, section 3.1.

    Args:
        encoder: name of the encoder (config key ``encoders.<name>``).
        rank: number of components R (ReDi: 8).
        pca: the components, or a function that makes them from the encoder's width.
        features: token layout of every encoder, by name.
        latent_shape: (C, H, W).

    Raises:
        UserError: when there is no such encoder, its tokens are no grid, or the components do not fit.
    """

    def __init__(
        self,
        rank: int,
        pca: PCA | Callable[[int], PCA],
        encoder: str = "main",
        *,
        features: Mapping[str, TokenSpec],
        latent_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        spec = _spec_of(encoder, features)
        if spec.grid is None:
            raise UserError(f"streams: the tokens of encoder '{encoder}' are no grid, so they make no map")
        self.encoder = encoder
        self.pca = pca if isinstance(pca, PCA) else pca(spec.dim)
        found, width = self.pca.components.shape
        if width != spec.dim:
            raise UserError(
                f"pca.path: components of width {width}, but encoder '{encoder}' has {spec.dim}; fit them by "
                "task=fit_pca with this encoder"
            )
        if not 1 <= rank <= found:
            raise UserError(f"streams.features.rank: expected 1 to {found}, the components there are, found {rank}")
        self.rank = rank
        self.size = latent_shape[1:]
        self.shape = (rank, *self.size)

    def forward(self, tokens: Tokens) -> Float[Tensor, "b r h w"]:
        scores = self.pca(tokens.patches.data, self.rank)
        assert tokens.grid is not None
        image = rearrange(scores, "b (h w) r -> b r h w", h=tokens.grid[0], w=tokens.grid[1])
        return F.interpolate(image, size=self.size, mode="bilinear", align_corners=False)


def _spec_of(encoder: str, features: Mapping[str, TokenSpec]) -> TokenSpec:
    if encoder not in features:
        raise unknown_choice("streams.encoder", encoder, features, "encoder; choose one by encoder=...")
    return features[encoder]
