"""What all KL autoencoders share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.latent_norm import Statistics
from repalign.autoencoders.posterior import from_log_variance
from repalign.autoencoders.weights import fingerprint_of, write_weights
from repalign.protocols import LatentNorm
from repalign.state import Gaussian, State


class KLAutoencoder(nn.Module, ABC):
    """A variational autoencoder with a diagonal Gaussian posterior over a grid of latents.

    A subclass gives the two networks: :meth:`moments` and :meth:`decode_unclamped`, both on pictures in [-1, 1].

    Attributes:
        channels: C of the latent.
        downsampling: image side / latent side.
        norm: between raw and normalised latents; None where nobody has measured them.
        sizes: the options that a file of these weights asks for.
        provenance: what the loaded file says of its origin; empty for random weights and foreign files.
    """

    channels: int
    downsampling: int
    norm: LatentNorm | None
    sizes: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {}
        self.provenance = {}

    @abstractmethod
    def moments(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b two_c h2 w2"]:
        """Pictures in [-1, 1] -> [mean, log variance] along the channels."""

    @abstractmethod
    def decode_unclamped(self, raw: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Raw latents -> pictures in [-1, 1] that may overshoot: what a reconstruction loss needs its gradient from."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight: where an adaptive adversarial term compares gradients."""

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Gaussian:
        """Pictures in [0, 1] -> posterior over raw latents."""
        return from_log_variance(self.moments(images * 2 - 1))

    def decode(self, raw: State) -> Float[Tensor, "b 3 h w"]:
        """Raw latents -> pictures, clamped to [0, 1]."""
        assert isinstance(raw, Tensor), "a KL autoencoder decodes one stream"
        return ((self.decode_unclamped(raw) + 1) / 2).clamp(0, 1)

    def stored_norm(self) -> LatentNorm | None:
        """The norm by the statistics that :meth:`save` stored with the weights; None when there are none."""
        mean, std = self.provenance.get("latent_mean"), self.provenance.get("latent_std")
        if isinstance(mean, list) and isinstance(std, list):
            return Statistics(mean, std)
        return None

    def save(self, path: str | Path, provenance: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
        """Write the weights, with sizes and provenance in the file's metadata.

        Args:
            path: .safetensors.
            provenance: plain values; ``latent_mean`` and ``latent_std`` (C numbers each) become the norm of an
                autoencoder that loads the file and is given no other.
            dtype: of the stored tensors; float16 halves the file.
        """
        write_weights(self, path, {"autoencoder": {"class": type(self).__name__, **self.sizes}, **provenance}, dtype)

    @property
    def fingerprint(self) -> str:
        """Stands for class and weights: the name under which latents may be cached."""
        return fingerprint_of(self)
