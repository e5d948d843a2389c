"""The parts of every diffusion or flow model: what is trained, what is frozen, how pictures are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_modules.base import RunModule
from lightning_modules.sharding import check_shardable, shard_parts
from repalign.autoencoders.first_batch import FirstBatchScale
from repalign.autoencoders.latent_norm import require_norm
from repalign.backbones.adapters import check_given, given_names, given_parameters
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
    StreamSource,
)
from repalign.state import StateShape, TokenSpec
from repalign.training.ema import EMA
from repalign.training.generate import Examples, ImageGenerator
from repalign.training.parts import check_parts
from repalign.training.policies import Policy

AlignerFactory = Callable[..., nn.Module]


class DiffusionModule(RunModule):
    """A diffusion or flow model with its autoencoder, encoders and aligners; how it is optimised is another base's.

    Args:
        backbone: the network, already behind its clock.
        objective: the training loss.
        path, parametrization: what sampling needs to know of the objective.
        conditioner: batch -> conditions.
        autoencoder: images <-> latents.
        encoders: frozen representations by name.
        aligners: factories by name; each is called with ``tap_specs`` and ``features`` and returns an ``Aligner``.
        sampler, guidance: how previews and samples are drawn.
        ema_decay, ema_warmup: see :class:`repalign.training.ema.EMA`.
        latent_shape: (C, H, W), or the shape of each stream by name.
        streams: what is diffused beside the latent, by name; frozen.
        examples: what the conditioner reads besides a label or caption when pictures are drawn; None when nothing.
        policies: what is done to the live backbone in place to save memory or time (:mod:`repalign.training.policies`).
        run: of the other base and of :class:`lightning_modules.base.RunModule`.

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
        ema_decay: float = 0.9999,
        ema_warmup: bool = False,
        latent_shape: StateShape,
        streams: Mapping[str, StreamSource] | None = None,
        examples: Examples | None = None,
        policies: Sequence[Policy] = (),
        **run: Any,
    ) -> None:
        super().__init__(**run)
        assert isinstance(backbone, nn.Module)
        features: dict[str, TokenSpec] = {name: encoder.spec for name, encoder in encoders.items()}
        built = {name: make(tap_specs=backbone.tap_specs, features=features) for name, make in aligners.items()}
        self.trained = nn.ModuleDict({"backbone": backbone, "aligners": nn.ModuleDict(built)})
        norm = autoencoder.norm
        self.measured = nn.ModuleDict()  # a scale that the first batch gives: kept, not averaged
        if isinstance(norm, nn.Module) and norm.state_dict():
            # Statistics that follow the latents are averaged like the weights.
            (self.measured if isinstance(norm, FirstBatchScale) else self.trained)["norm"] = norm
        self.ema = EMA(self.trained, ema_decay, ema_warmup, given_parameters(self.trained))
        self._given = {f"{owner}.{name}" for owner in ("trained", "ema.module") for name in given_names(self.trained)}
        # Frozen parts follow the module to its device but stay out of the checkpoint.
        self.frozen = nn.ModuleDict(
            {
                **{f"encoder_{name}": part for name, part in encoders.items() if isinstance(part, nn.Module)},
                **{f"stream_{name}": part for name, part in (streams or {}).items() if isinstance(part, nn.Module)},
                **{f"text_{name}": x for name, x in conditioner.text_encoders.items() if isinstance(x, nn.Module)},
            }
        )
        self.stage = nn.ModuleDict()  # of the first stage, where it is trained too; not averaged
        if isinstance(autoencoder, nn.Module):
            (self.stage if self.trains_autoencoder else self.frozen)["autoencoder"] = autoencoder
        self.frozen.requires_grad_(False).eval()
        self.objective = objective
        self.path = path
        self.parametrization = parametrization
        self.conditioner = conditioner
        self.encoders = dict(encoders)
        self.streams = dict(streams or {})
        self.examples = examples
        self._autoencoder = {"autoencoder": autoencoder}  # in a dict, so that it is registered once
        self.sampler = sampler
        self.guidance = guidance
        self.latent_shape = latent_shape
        self._sharded = False
        self.contract()
        check_parts(backbone, objective, self.aligners)
        for policy in policies:
            policy(backbone)

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
        """The autoencoder."""
        return self._autoencoder["autoencoder"]

    def configure_model(self) -> None:
        """Shard what is trained and its average, where the strategy shards (``trainer=fsdp``)."""
        mesh = self._device_mesh
        if mesh is not None and not self._sharded:
            self.require(not self._given, "tuning=lora shares its weights with the average; set trainer=ddp")
            check_shardable(self.backbone, {"conditioner": self.conditioner, "objective": self.objective})
            for parts in (self.trained, self.ema.module):
                assert isinstance(parts, nn.ModuleDict)
                shard_parts(parts, mesh["data_parallel"])
            self._sharded = True

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base's, but for weights that were given to low-rank tuning: they come from their own file."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if key not in self._given}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained parts and average.

        Raises:
            UserError: when the weights are of another architecture, or additions to other weights.
        """
        check_given(self, dict(state_dict))
        return super().load_state_dict(state_dict, strict, assign)

    def contract(self) -> None:
        """Check that the parts make this method; a method with requirements of its own says them here."""

    def after_step(self) -> None:
        """The average follows the weights."""
        self.ema.update(self.trained, self.progress.step)

    def train(self, mode: bool = True) -> DiffusionModule:
        """Frozen parts and the average stay in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        self.measured.train(mode)
        self.trained.train(mode)  # statistics of latents belong to a frozen autoencoder too, but they move
        self.ema.eval()
        return self

    def generator(self, ema: bool = True) -> ImageGenerator:
        """Everything that sampling needs, around the averaged or the live weights and latent statistics."""
        owner = self.ema.module if ema else self.trained
        return ImageGenerator(
            backbone=owner["backbone"],
            norm=self.latent_norm(ema),
            path=self.path,
            parametrization=self.parametrization,
            conditioner=self.conditioner,
            sampler=self.sampler,
            guidance=self.guidance,
            autoencoder=self.autoencoder,
            latent_shape=self.latent_shape,
            examples=self.examples,
        )

    def latent_norm(self, ema: bool = True) -> Any:
        """The norm that decodes what the averaged or the live weights sample."""
        owner = self.ema.module if ema else self.trained
        return owner["norm"] if "norm" in owner else require_norm(self.autoencoder)
