"""From labels or captions to pictures: noise, guided field, sampler, decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from repalign.state import LATENT, Cond, State, StateShape, Streams, latent_of, leading

Examples = Callable[[Tensor, Randomness], Mapping[str, Any]]  # labels and draws -> what the conditioner reads


def asked_by(conditioner: Conditioner) -> Literal["label", "caption"]:
    """By what a picture is asked for: its caption where that is all that is read (but its size), otherwise a class."""
    return "caption" if set(conditioner.reads) - {"size"} == {"caption"} else "label"


@dataclass(frozen=True)
class ImageGenerator:
    """Everything that sampling needs.

    A picture depends on its label or caption and its random stream alone, not on the batch. ``examples`` brings what a
    conditioner reads besides them (pictures, boxes), for a label; None for labels or captions alone.
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

    def __call__(self, wanted: Int[Tensor, " b"] | Sequence[str], random: Randomness) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] for class labels or captions."""
        return self.decode(self.latents(wanted, random))

    @torch.no_grad()
    def decode(self, raw: State) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [0, 1] of what :meth:`latents` gave; may run in another thread than it."""
        return self.autoencoder.decode(raw)

    def drawn_size(self, device: torch.device) -> Float[Tensor, " 3"]:
        """Height, width and aspect ratio of the pictures."""
        shape = self.latent_shape[LATENT] if isinstance(self.latent_shape, Mapping) else self.latent_shape
        height, width = (float(side * self.autoencoder.downsampling) for side in shape[-2:])
        return torch.tensor([height, width, height / width], device=device)

    @torch.no_grad()
    def latents(self, wanted: Int[Tensor, " b"] | Sequence[str], random: Randomness) -> State:
        """Raw latents: the sampler's work. Of a state of several streams the latent alone is kept."""

        def bind(cond: Cond) -> Field:
            return DenoisingField(self.backbone, self.path, self.parametrization, cond)

        x_1 = pure_noise(self.latent_shape, random)
        if isinstance(wanted, Tensor) and self.examples is not None:
            batch = dict(self.examples(wanted, random))
        else:
            batch = {asked_by(self.conditioner): wanted}
        if "size" in self.conditioner.reads:
            batch["size"] = self.drawn_size(leading(x_1).device).expand(len(wanted), 3)
        cond = self.conditioner(batch)
        null = self.conditioner.null(len(wanted), leading(x_1).device)
        field = self.guidance(bind, cond, null.completed(cond))
        latent = latent_of(self.sampler(field, x_1, random)).float()
        return self.norm.denormalize(latent)


def pure_noise(shape: StateShape, random: Randomness) -> State:
    """The state at t = 1, from the random stream ``x_1``, or ``x_1/<name>`` for each stream of the state."""
    if isinstance(shape, Mapping):
        return Streams({name: random.normal(f"x_1/{name}", own) for name, own in shape.items()})
    return random.normal("x_1", shape)
