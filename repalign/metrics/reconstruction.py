"""How close reconstructions are to their pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from repalign.metrics.suite import FeatureMetrics

# A picture restored without error counts as so many dB.
HIGHEST_PSNR = 100.0


class ReconstructionMetrics:
    """L1, PSNR, SSIM, LPIPS, and scores between the two sets as a whole (r-FID, r-FD).

    Pictures are floats in [0, 1]. ``l1`` = E|x - x'|; ``psnr`` = E[-10 log10 mean (x - x')^2], the mean over pictures;
    ``ssim``: Wang et al., IEEE TIP 2004, Gaussian window of 11 px, sigma 1.5; by torchmetrics.

    Args:
        perceptual: distance of two batches in [-1, 1], reported as ``lpips``; None leaves it out.
        features: scores of the reconstructions against the pictures that were given to it as reference; None leaves
            them out.
    """

    def __init__(
        self, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None, features: FeatureMetrics | None = None
    ) -> None:
        self.perceptual = perceptual
        self.features = features
        self._sums: dict[str, float] = {}
        self.count = 0

    @torch.no_grad()
    def update(self, images: Float[Tensor, "b 3 h w"], restored: Float[Tensor, "b 3 h w"]) -> None:
        """Add pictures with their reconstructions."""
        images, restored = images.float(), restored.float()
        psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(restored, images, strict=True)]
        ssim = structural_similarity_index_measure(restored, images, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        found = {
            "l1": (restored - images).abs().flatten(1).mean(1),
            "psnr": torch.stack(psnr).clamp(max=HIGHEST_PSNR),
            "ssim": ssim,
        }
        if self.perceptual is not None:
            found["lpips"] = self.perceptual(images * 2 - 1, restored * 2 - 1)
        if self.features is not None:
            self.features.update(restored)
        for name, values in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.double().sum().item()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """Every number by name, means over pictures.

        Raises:
            ValueError: when there is no picture.
        """
        if self.count == 0:
            raise ValueError("reconstruction metrics: there is no picture")
        scores = {} if self.features is None else self.features.compute()
        return {name: total / self.count for name, total in self._sums.items()} | scores

    def reset(self) -> None:
        """Forget the pictures."""
        self._sums, self.count = {}, 0
        if self.features is not None:
            self.features.reset()
