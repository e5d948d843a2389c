"""From labels to pictures: noise, guided field, sampler, decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
from repalign.state import Cond, State, StateShape, Streams, latent_of

Examples = Callable[[Tensor, Randomness], Mapping[str, Any]]  # labels and draws -> what the conditioner reads


@dataclass(frozen=True)
class ImageGenerator:
    """Everything that sampling needs. A picture depends on its label and its random stream alone, not on the batch.

    ``examples`` brings what a conditioner reads besides the label (captions, pictures, boxes); None for labels alone.
    ``latent_shape`` may be larger than in training where the backbone takes every size.
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
    examples: Examples | None = None

    @torch.no_grad()
    def __call__(self, labels: Int[Tensor, " b"], random: Randomness) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] for class labels; only the latent of the sampled state is decoded."""

        def bind(cond: Cond) -> Field:
            return DenoisingField(self.backbone, self.path, self.parametrization, cond)

        cond = self.conditioner({"label": labels} if self.examples is None else self.examples(labels, random))
        field = self.guidance(bind, cond, self.conditioner.null(len(labels), labels.device).completed(cond))
        latent = latent_of(self.sampler(field, pure_noise(self.latent_shape, random), random)).float()
        return self.autoencoder.decode(self.norm.denormalize(latent))


def pure_noise(shape: StateShape, random: Randomness) -> State:
    """The state at t = 1, from the random stream ``x_1``, or ``x_1/<name>`` for each stream of the state."""
    if isinstance(shape, Mapping):
        return Streams({name: random.normal(f"x_1/{name}", own) for name, own in shape.items()})
    return random.normal("x_1", shape)
