"""REPA-E."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_modules.diffusion import DiffusionModule
from lightning_modules.joint import Joint
from lightning_modules.origin import origin_of
from repalign.aligners.targets import EncoderTarget
from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.latent_norm import mean_and_std
from repalign.objectives.first_stage import FirstStage
from repalign.random import SampleRandom
from repalign.state import Losses
from repalign.training.end_to_end import EndToEnd, Shared

PHASES = ("autoencoder", "discriminator", "denoiser")


class REPAE(DiffusionModule, Joint):
    """End-to-end tuning of autoencoder and diffusion transformer (Leng, Singh et al., ICCV 2025, arXiv:2504.10483).

    A round has three phases on one batch: the autoencoder follows reconstruction, GAN, KL and, through the frozen
    transformer, REPA's alignment loss; the discriminator follows the reconstructions; the denoiser trains as in REPA on
    detached latents. Batch normalisation of the latents takes the place of a fixed scale, because their distribution
    moves. The equations are in :class:`repalign.training.end_to_end.EndToEnd`.
    Differs from REPA by the phases, by an autoencoder that is trained, and by running latent statistics.

    When the last step is done, the run folder gets ``autoencoder.safetensors``: the tuned autoencoder with the averaged
    latent statistics, which the second stage (a new transformer on its frozen latents, ``e2e_vae_sit_xl``) loads.

    Args:
        first_stage: reconstruction, regularizer and adversary of the autoencoder.
        alignment: weight of the alignment loss in the autoencoder's phase (paper: 1.5).
        diffusion: weight of the diffusion loss there (paper: 0; its ablation without stop-gradient: 1).
        parts: see :class:`lightning_modules.diffusion.DiffusionModule` and :class:`lightning_modules.joint.Joint`.

    Raises:
        UserError: when the parts do not make this method.
    """

    trains_autoencoder: ClassVar[bool] = True

    def __init__(self, *, first_stage: FirstStage, alignment: float, diffusion: float = 0.0, **parts: Any) -> None:
        super().__init__(**parts)
        self.end_to_end = EndToEnd(
            first_stage=first_stage,
            objective=self.objective,
            conditioner=self.conditioner,
            aligners=self.aligners,
            encoders=self.encoders,
            alignment=alignment,
            diffusion=diffusion,
        )
        adversarial, perceptual = first_stage.adversarial, first_stage.reconstruction.perceptual
        self.require(
            ("discriminator" in self.phases) == (adversarial is not None),
            "an adversarial term and a phase 'discriminator' go together; set both, or leave both out by "
            "ablation=repa_e_no_gan",
        )
        if adversarial is not None:
            self.stage["discriminator"] = adversarial.discriminator
        if isinstance(perceptual, nn.Module):
            self.frozen["perceptual"] = perceptual.requires_grad_(False).eval()
        self.check_phases()

    def contract(self) -> None:
        unknown = [name for name in self.phases if name not in PHASES]
        self.require(not unknown, f"has no phase '{unknown[0] if unknown else ''}'; its phases: {', '.join(PHASES)}")
        self.require(
            isinstance(self.autoencoder, KLAutoencoder),
            f"needs an autoencoder to train, found {type(self.autoencoder).__name__}; set autoencoder=sd_vae_mse",
        )
        self.require(not self.streams, "diffuses the latent alone; set streams=none")
        beside = {"conditioner": self.conditioner, "objective": self.objective}
        for name, part in beside.items():
            own = isinstance(part, nn.Module) and any(weight.requires_grad for weight in part.parameters())
            self.require(not own, f"has no phase that trains the weights of its {name}; set another {name}=...")
        scheduled = [name for name, aligner in self.aligners.items() if callable(aligner.weight)]
        self.require(not scheduled, f"weighs its aligners by numbers; '{''.join(scheduled[:1])}' follows a schedule")
        encoded = [a for a in self.aligners.values() if isinstance(a.target, EncoderTarget)]
        self.require(bool(encoded), "needs an aligner with an encoder target; set aligner=repa (and encoder=...)")

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Autoencoder, discriminator (if any), backbone, aligners, and the latent norm where it has statistics."""
        return {**dict(self.stage.items()), **dict(self.trained.items())}

    def begin(self, batch: dict[str, Any], random: SampleRandom) -> Shared:
        """The pass through the autoencoder, times and noise."""
        return self.end_to_end.begin(self._trained_autoencoder, batch, random)

    def losses(self, phase: str, shared: Shared) -> Losses:
        """The loss of one of the three phases."""
        step, norm = self.progress.step, self.autoencoder.norm
        assert norm is not None, "checked when the recipe was assembled"
        if phase == "discriminator":
            return self.end_to_end.discriminator_loss(shared, step)
        if phase == "denoiser":
            return self.end_to_end.denoiser_loss(shared, norm, self.backbone)
        losses = self.end_to_end.autoencoder_loss(shared, self._trained_autoencoder, norm, self.backbone, step)
        return Losses(losses.total, {**losses.terms, **self._latent_statistics(shared.reconstructed.latent)})

    def on_train_end(self) -> None:
        """Export the autoencoder once the last step is done."""
        if self.trainer.is_global_zero and self.progress.step == self.trainer.max_steps:
            autoencoder, target = self._trained_autoencoder, self.run_dir / "autoencoder.safetensors"
            statistics = mean_and_std(self.latent_norm(ema=True), autoencoder.channels)
            autoencoder.save(target, {**statistics, **origin_of(self, self.trainer.datamodule)}, torch.float32)
            print(f"autoencoder: {target}", flush=True)

    @property
    def _trained_autoencoder(self) -> KLAutoencoder:
        assert isinstance(self.autoencoder, KLAutoencoder)
        return self.autoencoder

    @torch.no_grad()
    def _latent_statistics(self, raw: Tensor) -> dict[str, Tensor]:
        """Smallest and largest channel deviation and largest channel mean of the batch: what the guard bounds."""
        deviation, mean = torch.std_mean(raw.detach().float(), dim=(0, 2, 3))
        return {"latent/std_min": deviation.min(), "latent/std_max": deviation.max(), "latent/mean": mean.abs().max()}
