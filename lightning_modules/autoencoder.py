"""Training of an autoencoder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_modules.one_phase import OnePhase
from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.statistics import measure
from repalign.objectives.reconstruction import Reconstruction
from repalign.protocols import Autoencoder
from repalign.random import SampleRandom
from repalign.training.phase import MakeOptimizer, MakeScheduler


class AutoencoderModule(OnePhase):
    """Auto-Encoding Variational Bayes (Kingma & Welling, arXiv:1312.6114), as the first stage of latent diffusion.

    loss = L1 + MSE between picture and reconstruction + w KL(q(z|x) || N(0, 1)); see
    :class:`repalign.objectives.reconstruction.Reconstruction`. When the last step is done, the run folder gets
    ``autoencoder.safetensors``: weights, latent statistics, provenance.

    Args:
        autoencoder: every parameter is trained.
        objective: the loss.
        optimizer: from parameters to optimizer.
        scheduler: from optimizer to learning-rate scheduler, stepped once per optimizer step; or None.
        seed: of every draw.
        parts: what a generative method is assembled from besides (backbone, conditioner, ...); not used here.

    Raises:
        UserError: when the autoencoder cannot be trained.
    """

    trained: KLAutoencoder

    def __init__(
        self,
        *,
        autoencoder: Autoencoder,
        objective: Reconstruction,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
        **parts: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler, seed=seed)
        self.require(
            isinstance(autoencoder, KLAutoencoder),
            f"{type(autoencoder).__name__} has no weights to train; set autoencoder=small_kl",
        )
        assert isinstance(autoencoder, KLAutoencoder)
        self.trained = autoencoder
        self.objective = objective

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one micro-batch of uint8 pictures."""
        random = SampleRandom(self.seed, batch["serial"].tolist(), self.device)
        result = self.objective(self.trained, batch["image"].float() / 255, random)
        total = result.total.mean()
        self.note(total, {name: loss.mean() for name, loss in result.losses.items()})
        return total

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
        The provenance: latent statistics, l1 and psnr, recipe, commit, date, licence.
    """
    target = Path(path)
    module.eval()
    images = (batch.to(module.device) for batch in data.reference_images(256))
    measured = measure(module.trained, images)
    record = module.run_dir / "run.json"
    run = json.loads(record.read_text()) if record.is_file() else {}
    optimizer = module.trainer.optimizers[0]
    provenance = {
        **measured,
        "data": type(data).__name__,
        "image_size": data.image_size,
        "data_fingerprint": data.fingerprint,
        "licence": data.attribution,
        "steps": module.progress.step,
        "batch_size": data.batch_size,
        "seed": module.seed,
        "objective": {**module.objective.weights, "latent_noise": module.objective.latent_noise},
        "optimizer": {"class": type(optimizer).__name__, "lr": optimizer.defaults["lr"]},
        "commit": run.get("commit"),
        "hardware": run.get("hardware"),
        "versions": run.get("versions"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    module.trained.save(target, provenance)
    print(f"autoencoder: L1 {measured['l1']:.4f}, PSNR {measured['psnr']:.2f} dB; {target}", flush=True)
    return provenance
