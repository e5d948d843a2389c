"""From labels or captions to pictures: noise, guided field, sampler, decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repalign.protocols import (
    Autoencoder,
    Backbone,
    Conditioner,
    Field,
    Guidance,
    LatentNorm,
    Parametrization,
    Path,
    Randomness,
    Sampler,
)
from repalign.samplers.field import DenoisingField
from repalign.state import Cond, State, StateShape, Streams, latent_of, leading


@dataclass(frozen=True)
class ImageGenerator:
    """Everything that sampling needs.

    A picture depends on its label or caption and its random stream alone, not on the batch.
    """

    backbone: Backbone
    path: Path
    parametrization: Parametrization
    conditioner: Conditioner
    sampler: Sampler
    guidance: Guidance
    norm: LatentNorm
    autoencoder: Autoencoder
    latent_shape: StateShape

    @property
    def reads(self) -> str:
        """By what a picture is asked for: ``label`` or ``caption``."""
        return self.conditioner.reads

    @torch.no_grad()
    def __call__(self, wanted: Int[Tensor, " b"] | Sequence[str], random: Randomness) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] for class labels or captions; only the latent of the sampled state is decoded."""

        def bind(cond: Cond) -> Field:
            return DenoisingField(self.backbone, self.path, self.parametrization, cond)

        x_1 = pure_noise(self.latent_shape, random)
        cond = self.conditioner({self.reads: wanted})
        field = self.guidance(bind, cond, self.conditioner.null(len(wanted), leading(x_1).device))
        latent = latent_of(self.sampler(field, x_1, random)).float()
        return self.autoencoder.decode(self.norm.denormalize(latent))


def pure_noise(shape: StateShape, random: Randomness) -> State:
    """The state at t = 1, from the random stream ``x_1``, or ``x_1/<name>`` for each stream of the state."""
    if isinstance(shape, Mapping):
        return Streams({name: random.normal(f"x_1/{name}", own) for name, own in shape.items()})
    return random.normal("x_1", shape)
