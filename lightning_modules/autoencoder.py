"""Training of an autoencoder: the first stage of a latent model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lightning_modules.joint import Joint
from lightning_modules.origin import origin_of
from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.statistics import measure
from repalign.autoencoders.vq import VQAutoencoder
from repalign.metrics.reconstruction import ReconstructionMetrics
from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstructed
from repalign.protocols import Autoencoder
from repalign.random import SampleRandom
from repalign.state import Losses
from repalign.training.phase import Phase


class AutoencoderModule(Joint):
    """The first stage of latent diffusion (Rombach et al., arXiv:2112.10752, section 3.1).

    Phase ``autoencoder``: pixel error + LPIPS + KL or codebook + adversarial term; phase ``discriminator``, where the
    objective has one: hinge loss on the same reconstruction. See :class:`repalign.objectives.first_stage.FirstStage`.
    When the last step is done, the run folder gets ``autoencoder.safetensors``: weights, latent statistics, provenance.
    Deviations from the official code: both phases share one pass through the autoencoder (there each has its own);
    before the adversarial term starts the discriminator is not stepped at all (there it is, by a loss of zero).

    Args:
        autoencoder: every parameter is trained.
        objective: the losses.
        phases: by name: ``autoencoder``, and ``discriminator`` if the objective has an adversarial term.
        accumulate: micro-batches per step.
        seed: of every draw.
        parts: what a generative method is assembled from besides (backbone, conditioner, ...); not used here.

    Raises:
        UserError: when the autoencoder cannot be trained, or phases and objective do not fit.
    """

    trains_autoencoder: ClassVar[bool] = True

    def __init__(
        self,
        *,
        autoencoder: Autoencoder,
        objective: FirstStage,
        phases: Mapping[str, Phase],
        accumulate: int = 1,
        seed: int = 0,
        **parts: Any,
    ) -> None:
        super().__init__(phases=phases, accumulate=accumulate, seed=seed)
        self.require(
            isinstance(autoencoder, KLAutoencoder | VQAutoencoder),
            f"{type(autoencoder).__name__} has no weights to train; set autoencoder=small_kl",
        )
        assert isinstance(autoencoder, KLAutoencoder | VQAutoencoder)
        adversarial = objective.adversarial
        self.require(
            ("discriminator" in phases) == (adversarial is not None),
            "an adversarial term and a phase 'discriminator' go together; set method=autoencoder for an objective "
            "without one, method=autoencoder_adversarial for an objective with one",
        )
        self.objective = objective
        self.autoencoder = autoencoder
        self.discriminator = None if adversarial is None else adversarial.discriminator
        perceptual = objective.reconstruction.perceptual
        self.frozen = nn.ModuleDict({"perceptual": perceptual} if isinstance(perceptual, nn.Module) else {})
        self.check_phases()

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The autoencoder and its adversary."""
        adversary = {} if self.discriminator is None else {"discriminator": self.discriminator}
        return {"autoencoder": self.autoencoder, **adversary}

    def begin(self, batch: dict[str, Any], random: SampleRandom) -> Reconstructed:
        """One pass through the autoencoder over a micro-batch of uint8 pictures."""
        return self.objective.reconstruct(self.autoencoder, batch["image"].float() / 255, random)

    def losses(self, phase: str, shared: Reconstructed) -> Losses:
        """The loss of one of the two phases."""
        step = self.progress.step
        if phase == "discriminator":
            return self.objective.discriminator_loss(shared, step)
        return self.objective.autoencoder_loss(self.autoencoder, shared, step)

    def on_train_end(self) -> None:
        """Export once the last step is done."""
        if self.trainer.is_global_zero and self.progress.step == self.trainer.max_steps:
            export(self, self.trainer.datamodule, self.run_dir / "autoencoder.safetensors")


def export(module: AutoencoderModule, data: Any, path: str | Path) -> dict[str, Any]:
    """Measure latents and reconstructions over the data set, write weights with latent statistics and provenance.

    Args:
        module: trained.
        data: data module whose pictures are measured.
        path: target .safetensors.

    Returns:
        The provenance: latent statistics, l1, psnr and ssim, recipe, commit, date, licence.
    """
    target = Path(path)
    module.eval()
    images = (batch.to(module.device) for batch in data.reference_images(256))
    metrics = ReconstructionMetrics()
    measured = {**measure(module.autoencoder, images, metrics.update), **metrics.compute()}
    optimizer = module.trainer.optimizers[0]
    reconstruction = module.objective.reconstruction
    settings = {
        "reconstruction": reconstruction,
        "regularizer": reconstruction.regularizer,
        "adversarial": module.objective.adversarial,
    }
    provenance = {
        **measured,
        **origin_of(module, data),
        "objective": {name: _plain(part) for name, part in settings.items() if part is not None},
        "optimizer": {"class": type(optimizer).__name__, "lr": optimizer.defaults["lr"]},
    }
    module.autoencoder.save(target, provenance)
    shown = ", ".join(f"{name} {measured[key]:.4g}" for name, key in (("L1", "l1"), ("PSNR", "psnr"), ("SSIM", "ssim")))
    print(f"autoencoder: {shown}; {target}", flush=True)
    return provenance


def _plain(part: object) -> dict[str, Any]:
    """The settings of an object that can stand in a file: numbers, words and tables of them."""
    return {"class": type(part).__name__} | {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, int | float | str | dict) and not name.startswith("_")
    }
