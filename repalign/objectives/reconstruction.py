"""The training loss of a variational autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import unknown_choice
from repalign.protocols import Randomness
from repalign.state import Gaussian


class Reconstructing(Protocol):
    """An autoencoder that can be trained: its decoder's output without the clamp to [0, 1]."""

    def encode(self, images: Tensor) -> Gaussian: ...
    def decode_unclamped(self, raw: Tensor) -> Tensor: ...  # -> [B, 3, H, W] in [-1, 1], may overshoot


@dataclass(frozen=True)
class Reconstructed:
    """What the objective returns.

    Attributes:
        losses: unweighted terms [B] by name: ``l1``, ``mse``, ``kl``.
        total: [B], the weighted sum, to be averaged and differentiated.
        images: [B, 3, H, W] in [0, 1], the reconstruction.
    """

    losses: Mapping[str, Float[Tensor, " b"]]
    total: Float[Tensor, " b"]
    images: Float[Tensor, "b 3 h w"]


def kl_divergence(posterior: Gaussian) -> Float[Tensor, "b c h w"]:
    """KL(N(mean, std^2) || N(0, 1)) per element = 0.5 (mean^2 + std^2 - 1 - log std^2), in nats."""
    assert posterior.std is not None, "a KL term needs an encoder with a posterior"
    return 0.5 * (posterior.mean**2 + posterior.std**2 - 1) - posterior.std.log()


class Reconstruction:
    """L1 + squared error on pictures in [-1, 1], and the KL divergence of the posterior from a standard normal.

    loss = w_l1 |x - D(z)| + w_mse (x - D(z))^2 + w_kl KL(q(z|x) || N(0, 1)), z = mean + std n, n ~ N(0, 1)
    (Kingma & Welling, arXiv:1312.6114; the reconstruction terms of Rombach et al., arXiv:2112.10752, section 3.1).

    Args:
        l1, mse, kl: weights of the terms. With the sums of ``reduction: sum`` LDM's KL weight is 1e-6; with means, a
            comparable pressure on the latents is larger by the ratio of picture to latent elements.
        reduction: 'mean' over the elements of a sample, or 'sum' as in LDM.
        latent_noise: standard deviation of more noise on z, times a level drawn from U[0, 1) per sample. It teaches
            the decoder to bear the imperfect latents of a diffusion model (as RAE does, arXiv:2510.11690).

    Raises:
        UserError: for another reduction.
    """

    def __init__(
        self,
        *,
        l1: float = 1.0,
        mse: float = 1.0,
        kl: float = 1e-3,
        reduction: Literal["mean", "sum"] = "mean",
        latent_noise: float = 0.0,
    ) -> None:
        reductions: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum}
        if reduction not in reductions:
            raise unknown_choice("objective.reduction", reduction, reductions)
        self.weights = {"l1": l1, "mse": mse, "kl": kl}
        self.latent_noise = latent_noise
        self._reduce = reductions[reduction]

    def __call__(
        self, autoencoder: Reconstructing, images: Float[Tensor, "b 3 h w"], random: Randomness
    ) -> Reconstructed:
        """Encode, draw a latent (stream ``posterior``), decode, compare.

        Args:
            autoencoder: with gradients.
            images: in [0, 1].
            random: one stream per sample.
        """
        posterior = autoencoder.encode(images)
        raw = posterior.sample(random.normal("posterior", posterior.mean.shape[1:]))
        if self.latent_noise > 0:
            level = self.latent_noise * random.uniform("latent_noise_level").reshape(-1, 1, 1, 1)
            raw = raw + level * random.normal("latent_noise", raw.shape[1:])
        output = autoencoder.decode_unclamped(raw)
        difference = output - (images * 2 - 1)
        elements = {"l1": difference.abs(), "mse": difference**2, "kl": kl_divergence(posterior)}
        losses = {name: self._reduce(value.flatten(1), dim=1) for name, value in elements.items()}
        weighted = [self.weights[name] * loss for name, loss in losses.items()]
        return Reconstructed(losses, torch.stack(weighted).sum(0), ((output.detach() + 1) / 2).clamp(0, 1))
