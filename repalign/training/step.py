"""One training step, the same for every method: latents, draw, objective, aligners, weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from repalign.autoencoders.latent_norm import require_norm
from repalign.nn.precision import as_input, at_least_float32
from repalign.protocols import (
    Aligner,
    Autoencoder,
    Backbone,
    Conditioner,
    Encoder,
    LatentNorm,
    Objective,
    Randomness,
    StreamSource,
)
from repalign.state import LATENT, Cond, Draw, Gaussian, Losses, State, Step, Streams, Tokens

Batch = Mapping[str, Any]


@dataclass
class StepContext:
    """What aligners read of a step (protocol ``Context``); encoder features are computed at most once.

    ``random`` and the conditions before dropping are for teachers, which draw and condition for themselves.
    """

    images: Tensor | None
    x_0: State
    cond: Cond
    draw: Draw
    step: Step
    backbone: Backbone
    teacher: Backbone | None
    compute_features: Callable[[str], Tokens]
    random: Randomness | None = None
    compute_undropped: Callable[[], Cond] | None = None
    _features: dict[str, Tokens] = field(default_factory=dict)

    def features(self, encoder: str) -> Tokens:
        """Tokens of an encoder for the clean images of this batch."""
        if encoder not in self._features:
            self._features[encoder] = self.compute_features(encoder)
        return self._features[encoder]

    def undropped(self) -> Cond:
        """The conditions before any was dropped."""
        assert self.compute_undropped is not None, "this step keeps its dropped conditions alone"
        return self.compute_undropped()


def images_of(batch: Batch) -> Tensor | None:
    """The batch's pictures as float [B, 3, H, W] in [0, 1], or None when only cached latents came."""
    images = batch.get("image")
    return None if images is None else as_input(images) / 255


def latents_of(batch: Batch, autoencoder: Autoencoder, random: Randomness, norm: LatentNorm | None = None) -> State:
    """Normalised latents: from cached moments when the batch has them, else by encoding the images.

    x_0 = norm(mean + std n) with fresh noise n at every step. ``norm`` None: the autoencoder's own.

    Raises:
        UserError: when the autoencoder has no latent statistics.
    """
    if "moments_mean" in batch:
        std = batch.get("moments_std")
        posterior = Gaussian(at_least_float32(batch["moments_mean"]), None if std is None else at_least_float32(std))
    else:
        images = images_of(batch)
        assert images is not None, "a batch holds images or cached moments"
        with torch.no_grad():
            posterior = autoencoder.encode(images)
    noise = random.normal("posterior", posterior.mean.shape[1:])
    return (require_norm(autoencoder) if norm is None else norm).normalize(posterior.sample(noise))


def features_of(batch: Batch, encoders: Mapping[str, Encoder]) -> Callable[[str], Tokens]:
    """Reads an encoder's tokens from the batch's cache, or runs the encoder on the images."""

    def compute(name: str) -> Tokens:
        encoder = encoders[name]
        cached = batch.get(f"features/{name}")
        if cached is not None:
            return Tokens(at_least_float32(cached), encoder.spec.grid, encoder.spec.prefix)
        images = images_of(batch)
        assert images is not None, "a batch holds images or cached features"
        return encoder(images)

    return compute


def with_features(batch: Batch, encoders: Mapping[str, Encoder], names: Collection[str]) -> Batch:
    """The batch with the tokens of these encoders in it, so that streams and aligners share one call of each."""
    read = features_of(batch, encoders)
    return {**batch, **{f"features/{name}": read(name).data for name in names}}


def state_of(
    batch: Batch,
    autoencoder: Autoencoder,
    encoders: Mapping[str, Encoder],
    streams: Mapping[str, StreamSource],
    random: Randomness,
    norm: LatentNorm | None = None,
) -> State:
    """x_0 of a batch: the normalised latent; with further streams, all of them by name, the latent first."""
    latent = latents_of(batch, autoencoder, random, norm)
    if not streams:
        return latent
    assert isinstance(latent, Tensor), "an autoencoder gives one stream"
    read = features_of(batch, encoders)
    further = {name: source(read(source.encoder)) for name, source in streams.items()}
    return Streams({LATENT: latent, **further})


def draw_of(objective: Objective, conditioner: Conditioner, x_0: State, random: Randomness) -> Draw:
    """Everything random in a step: times and noise of the objective, dropped conditions of the conditioner."""
    draw = objective.draw(x_0, random)
    return replace(draw, drop={**draw.drop, **conditioner.draw_drop(random)})


def losses_at(
    draw: Draw,
    *,
    backbone: Backbone,
    objective: Objective,
    conditioner: Conditioner,
    aligners: Mapping[str, Aligner],
    encoders: Mapping[str, Encoder],
    x_0: State,
    batch: Batch,
    teacher: Backbone | None = None,
    random: Randomness | None = None,
    only_taps: bool = False,
) -> dict[str, Tensor]:
    """Batch means of every loss at a given draw, unweighted: the objective's by their names, ``align/<name>``.

    Beside them ``figure/<name>``: what the objective wants to be seen, and no loss.

    Args:
        draw: times, noise, dropped conditions.
        backbone: that predicts.
        objective: whose losses are taken.
        conditioner: from batch and dropped names to conditions.
        aligners: by name; without any, no encoder is read.
        encoders: by name.
        x_0: normalised latents.
        batch: labels, and pictures or cached features.
        teacher: averaged backbone, for aligners that read one.
        random: the streams behind the draw, for aligners that draw for themselves (the time of a teacher).
        only_taps: stop after the last hidden state that an aligner wants; the objective's own losses are left out.
    """
    cond = conditioner(batch, draw.drop)
    taps = tuple(dict.fromkeys(tap for aligner in aligners.values() for tap in aligner.taps))
    step = objective(backbone, x_0, cond, draw, taps=taps, only_taps=only_taps)
    context = StepContext(
        images=images_of(batch),
        x_0=x_0,
        cond=cond,
        draw=draw,
        step=step,
        backbone=backbone,
        teacher=teacher,
        compute_features=features_of(batch, encoders),
        random=random,
        compute_undropped=lambda: conditioner(batch),
    )
    terms = {name: loss.mean() for name, loss in step.losses.items()}
    terms |= {f"figure/{name}": value.detach().mean() for name, value in step.figures.items()}
    return terms | {f"align/{name}": aligner(context).mean() for name, aligner in aligners.items()}


def weight_at(weight: float | Callable[[int], float], step: int | None) -> float:
    """An aligner's weight after so many finished steps: a number, or a schedule called with them."""
    if not callable(weight):
        return weight
    assert step is not None, "an aligner's weight follows a schedule, but this training does not say its step"
    return weight(step)


def own_terms(terms: Mapping[str, Tensor]) -> list[Tensor]:
    """The objective's own losses among the terms of a step."""
    return [term for name, term in terms.items() if not name.startswith(("align/", "figure/"))]


def total_of(terms: Mapping[str, Tensor], aligners: Mapping[str, Aligner], step: int | None = None) -> Tensor:
    """Sum of the objective's terms + sum over aligners of weight x term; ``step`` is the number of finished steps."""
    weighted = [weight_at(aligner.weight, step) * terms[f"align/{name}"] for name, aligner in aligners.items()]
    return torch.stack([*own_terms(terms), *weighted]).sum()


def training_losses(
    *,
    objective: Objective,
    conditioner: Conditioner,
    aligners: Mapping[str, Aligner],
    x_0: State,
    random: Randomness,
    step: int | None = None,
    **parts: Any,
) -> Losses:
    """Losses of a batch: a draw, every term at it (:func:`losses_at` has the arguments), their weighted sum."""
    draw = draw_of(objective, conditioner, x_0, random)
    shared = {"objective": objective, "conditioner": conditioner, "aligners": aligners, "x_0": x_0, "random": random}
    terms = losses_at(draw, **shared, **parts)
    return Losses(total_of(terms, aligners, step), terms)
