"""The base of every method that trains in one phase with automatic optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.one_phase import MakeOptimizer, MakeScheduler, OnePhase
from repalign.errors import UserError
from repalign.protocols import (
    Autoencoder,
    Backbone,
    Conditioner,
    Encoder,
    Guidance,
    Objective,
    Parametrization,
    Path,
    Sampler,
)
from repalign.random import SampleRandom
from repalign.state import TokenSpec
from repalign.training.ema import EMA
from repalign.training.generate import ImageGenerator
from repalign.training.step import latents_of, training_losses

AlignerFactory = Callable[..., nn.Module]


class Generative(OnePhase):
    """A diffusion or flow model: objective + aligners -> one loss, one optimizer, an EMA.

    The loss maths is the core's (:func:`repalign.training.step.training_losses`). Everything random in a step is a pure
    function of (seed, serial number of the sample), so the same global batch gives the same losses on any number of
    ranks, and a resumed run repeats the uninterrupted one.

    Args:
        backbone: the network, already behind its clock.
        objective: the training loss.
        path, parametrization: what sampling needs to know of the objective.
        conditioner: batch -> conditions.
        autoencoder: images <-> latents; frozen.
        encoders: frozen representations by name.
        aligners: factories by name; each is called with ``tap_specs`` and ``features`` and returns an ``Aligner``.
        sampler, guidance: how previews and samples are drawn.
        optimizer: from parameters to optimizer.
        scheduler: from optimizer to learning-rate scheduler, stepped once per optimizer step; or None.
        ema_decay, ema_warmup: see :class:`repalign.training.ema.EMA`.
        latent_shape: (C, H, W).
        seed: of every draw.
        compile: ``torch.compile`` the backbone (in place; the keys of the weights stay).

    Raises:
        UserError: when the parts do not make this method (see :meth:`contract`).
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        objective: Objective,
        path: Path,
        parametrization: Parametrization,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        encoders: Mapping[str, Encoder],
        aligners: Mapping[str, AlignerFactory],
        sampler: Sampler,
        guidance: Guidance,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        ema_decay: float = 0.9999,
        ema_warmup: bool = False,
        latent_shape: tuple[int, int, int],
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, scheduler, seed)
        assert isinstance(backbone, nn.Module)
        features: dict[str, TokenSpec] = {name: encoder.spec for name, encoder in encoders.items()}
        built = {name: make(tap_specs=backbone.tap_specs, features=features) for name, make in aligners.items()}
        self.trained = nn.ModuleDict({"backbone": backbone, "aligners": nn.ModuleDict(built)})
        self.ema = EMA(self.trained, ema_decay, ema_warmup)
        # Frozen parts follow the module to its device but stay out of the checkpoint.
        self.frozen = nn.ModuleDict(
            {
                **{f"encoder_{name}": part for name, part in encoders.items() if isinstance(part, nn.Module)},
                **({"autoencoder": autoencoder} if isinstance(autoencoder, nn.Module) else {}),
            }
        )
        self.frozen.requires_grad_(False).eval()
        self.objective = objective
        self.path = path
        self.parametrization = parametrization
        self.conditioner = conditioner
        self.encoders = dict(encoders)
        self._autoencoder = {"autoencoder": autoencoder}  # in a dict, so that it is registered once, among the frozen
        self.sampler = sampler
        self.guidance = guidance
        self.latent_shape = latent_shape
        self.contract()
        if compile:
            backbone.compile()

    @property
    def backbone(self) -> Backbone:
        """The live backbone."""
        return self.trained["backbone"]

    @property
    def aligners(self) -> Mapping[str, Any]:
        """The aligners by name."""
        return dict(self.trained["aligners"].items())

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder."""
        return self._autoencoder["autoencoder"]

    def contract(self) -> None:
        """Check that the parts make this method; a method with requirements of its own says them here."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        random = SampleRandom(self.seed, batch["serial"].tolist(), self.device)
        # Layers that draw for themselves (dropout) get a state that depends on the step alone, as everything else does.
        torch.manual_seed(self.seed + int(batch["serial"][0]))
        losses = training_losses(
            backbone=self.backbone,
            objective=self.objective,
            conditioner=self.conditioner,
            aligners=self.aligners,
            encoders=self.encoders,
            x_0=latents_of(batch, self.autoencoder, random),
            batch=batch,
            random=random,
            teacher=self.ema.module["backbone"],
        )
        self.note(losses.total, losses.terms)
        return losses.total

    def after_step(self) -> None:
        """The average follows the weights."""
        self.ema.update(self.trained, self.progress.step)

    def train(self, mode: bool = True) -> Generative:
        """Frozen parts and the average stay in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        self.ema.eval()
        return self

    def generator(self, ema: bool = True) -> ImageGenerator:
        """Everything that sampling needs, around the averaged or the live weights."""
        return ImageGenerator(
            backbone=self.ema.module["backbone"] if ema else self.backbone,
            path=self.path,
            parametrization=self.parametrization,
            conditioner=self.conditioner,
            sampler=self.sampler,
            guidance=self.guidance,
            autoencoder=self.autoencoder,
            latent_shape=self.latent_shape,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trained parts and their average; frozen parts come from their own files."""
        whole = super().state_dict(*args, **kwargs)
        return {key: value for key, value in whole.items() if not key.startswith("frozen.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained parts and average.

        Raises:
            UserError: when the weights are of another architecture; the line names the first difference.
        """
        own = self.state_dict()
        for key in sorted(own.keys() | state_dict.keys()):
            self._same_shape(key, own.get(key), state_dict.get(key))
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    @staticmethod
    def _same_shape(key: str, expected: Tensor | None, found: Tensor | None) -> None:
        sizes = ["absent" if x is None else "x".join(map(str, x.shape)) or "scalar" for x in (expected, found)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"checkpoint of another architecture: '{key}' is {sizes[1]} in the file, {sizes[0]} in this "
                "composition; compose the same experiment, backbone and aligners as the checkpoint's config.yaml"
            )
