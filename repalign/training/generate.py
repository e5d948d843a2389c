"""From labels to pictures: noise, guided field, sampler, decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repalign.autoencoders.latent_norm import require_norm
from repalign.protocols import (
    Autoencoder,
    Backbone,
    Conditioner,
    Field,
    Guidance,
    Parametrization,
    Path,
    Randomness,
    Sampler,
)
from repalign.samplers.field import DenoisingField
from repalign.state import Cond


@dataclass(frozen=True)
class ImageGenerator:
    """Everything that sampling needs. A picture depends on its label and its random stream alone, not on the batch."""

    backbone: Backbone
    path: Path
    parametrization: Parametrization
    conditioner: Conditioner
    sampler: Sampler
    guidance: Guidance
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]

    @torch.no_grad()
    def __call__(self, labels: Int[Tensor, " b"], random: Randomness) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] for class labels; the noise comes from the stream ``x_1``."""

        def bind(cond: Cond) -> Field:
            return DenoisingField(self.backbone, self.path, self.parametrization, cond)

        cond = self.conditioner({"label": labels})
        field = self.guidance(bind, cond, self.conditioner.null(len(labels), labels.device))
        latent = self.sampler(field, random.normal("x_1", self.latent_shape), random)
        assert isinstance(latent, Tensor), "an image generator samples one stream"
        return self.autoencoder.decode(require_norm(self.autoencoder).denormalize(latent.float()))
