"""The base of every method that trains in one phase with automatic optimisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.diffusion import DiffusionModule
from lightning_modules.one_phase import OnePhase
from repalign.random import SampleRandom
from repalign.training.step import state_of, training_losses, with_features


class Generative(DiffusionModule, OnePhase):
    """A diffusion or flow model: objective + aligners -> one loss, one optimizer, an EMA.

    The loss maths is the core's (:func:`repalign.training.step.training_losses`). Everything random in a step is a pure
    function of (seed, serial number of the sample), so the same global batch gives the same losses on any number of
    ranks, and a resumed run repeats the uninterrupted one.
    """

    def learned(self) -> Iterable[nn.Parameter]:
        """The trained parts and, where they have weights, conditioner and objective."""
        beside = [part for part in (self.conditioner, self.objective) if isinstance(part, nn.Module)]
        return (p for part in (self.trained, *beside) for p in part.parameters())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        random = SampleRandom(self.seed, batch["serial"].tolist(), self.device)
        # Layers that draw for themselves (dropout) get a state that depends on the step alone, as everything else does.
        torch.manual_seed(self.seed + int(batch["serial"][0]))
        batch = with_features(batch, self.encoders, [source.encoder for source in self.streams.values()])
        losses = training_losses(
            backbone=self.backbone,
            objective=self.objective,
            conditioner=self.conditioner,
            aligners=self.aligners,
            encoders=self.encoders,
            x_0=state_of(batch, self.autoencoder, self.encoders, self.streams, random),
            batch=batch,
            random=random,
            teacher=self.ema.module["backbone"],
            step=self.progress.step,
        )
        self.note(losses.total, losses.terms)
        return losses.total
