"""One training step, the same for every method: latents, draw, objective, aligners, weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repalign.autoencoders.latent_norm import require_norm
from repalign.protocols import Aligner, Autoencoder, Backbone, Conditioner, Encoder, Objective, Randomness
from repalign.state import Cond, Draw, Gaussian, State, Step, Tokens

Batch = Mapping[str, Any]


@dataclass
class StepContext:
    """What aligners read of a step (protocol ``Context``); encoder features are computed at most once."""

    images: Tensor | None
    x_0: State
    cond: Cond
    draw: Draw
    step: Step
    backbone: Backbone
    teacher: Backbone | None
    compute_features: Callable[[str], Tokens]
    _features: dict[str, Tokens] = field(default_factory=dict)

    def features(self, encoder: str) -> Tokens:
        """Tokens of an encoder for the clean images of this batch."""
        if encoder not in self._features:
            self._features[encoder] = self.compute_features(encoder)
        return self._features[encoder]


@dataclass(frozen=True)
class Losses:
    """The total to differentiate and every term's batch mean, by name."""

    total: Tensor
    terms: Mapping[str, Tensor]


def images_of(batch: Batch) -> Tensor | None:
    """The batch's pictures as float [B, 3, H, W] in [0, 1], or None when only cached latents came."""
    images = batch.get("image")
    return None if images is None else images.float() / 255


def latents_of(batch: Batch, autoencoder: Autoencoder, random: Randomness) -> State:
    """Normalised latents: from cached moments when the batch has them, else by encoding the images.

    x_0 = norm(mean + std n) with fresh noise n at every step.

    Raises:
        UserError: when the autoencoder has no latent statistics.
    """
    if "moments_mean" in batch:
        std = batch.get("moments_std")
        posterior = Gaussian(batch["moments_mean"].float(), None if std is None else std.float())
    else:
        images = images_of(batch)
        assert images is not None, "a batch holds images or cached moments"
        with torch.no_grad():
            posterior = autoencoder.encode(images)
    noise = random.normal("posterior", posterior.mean.shape[1:])
    return require_norm(autoencoder).normalize(posterior.sample(noise))


def features_of(batch: Batch, encoders: Mapping[str, Encoder]) -> Callable[[str], Tokens]:
    """Reads an encoder's tokens from the batch's cache, or runs the encoder on the images."""

    def compute(name: str) -> Tokens:
        encoder = encoders[name]
        cached = batch.get(f"features/{name}")
        if cached is not None:
            return Tokens(cached.float(), encoder.spec.grid, encoder.spec.prefix)
        images = images_of(batch)
        assert images is not None, "a batch holds images or cached features"
        return encoder(images)

    return compute


def training_losses(
    *,
    backbone: Backbone,
    objective: Objective,
    conditioner: Conditioner,
    aligners: Mapping[str, Aligner],
    encoders: Mapping[str, Encoder],
    x_0: State,
    batch: Batch,
    random: Randomness,
    teacher: Backbone | None = None,
) -> Losses:
    """Losses of a batch: total = sum of the objective's means + sum over aligners of weight x mean.

    The terms are named as the objective names them, and ``align/<name>`` for the aligners (unweighted).
    """
    cond = conditioner(batch)
    draw = objective.draw(x_0, random)
    drop = conditioner.draw_drop(random)
    draw = Draw(draw.t, draw.eps, {**draw.drop, **drop})
    null = conditioner.null(random.batch, batch["label"].device)
    for dropped in drop.values():
        cond = cond.where(dropped, null)

    taps = tuple(dict.fromkeys(tap for aligner in aligners.values() for tap in aligner.taps))
    step = objective(backbone, x_0, cond, draw, taps=taps)
    context = StepContext(images_of(batch), x_0, cond, draw, step, backbone, teacher, features_of(batch, encoders))
    terms = {name: loss.mean() for name, loss in step.losses.items()}
    total = torch.stack(list(terms.values())).sum()
    for name, aligner in aligners.items():
        terms[f"align/{name}"] = aligner(context).mean()
        total = total + aligner.weight * terms[f"align/{name}"]
    return Losses(total, terms)
