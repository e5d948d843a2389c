"""What keeps the latents of a first stage tame: a KL penalty or a codebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import unknown_choice
from repalign.protocols import Randomness
from repalign.state import Gaussian

REDUCTIONS: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum}


class Reconstructing(Protocol):
    """An autoencoder that can be trained: its decoder's output comes without the clamp to [0, 1]."""

    @property
    def last_layer(self) -> nn.Parameter: ...  # the decoder's last weight
    def encode(self, images: Tensor) -> Gaussian: ...
    def decode_unclamped(self, raw: Tensor) -> Tensor: ...  # -> [B, 3, H, W] in [-1, 1], may overshoot


class Codes(Protocol):
    """Latents on a codebook."""

    @property
    def latent(self) -> Tensor: ...  # [B, C, H, W], with a straight-through gradient
    @property
    def loss(self) -> Tensor: ...  # [B]
    @property
    def indices(self) -> Tensor: ...  # [B, H, W]


class Quantizing(Reconstructing, Protocol):
    """An autoencoder with a codebook between encoder and decoder."""

    def quantize(self, raw: Tensor) -> Codes: ...
    def decode_quantized(self, latent: Tensor) -> Tensor: ...
    def code_usage(self, indices: Tensor) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Regularized:
    """What a regularizer made of an encoder's output.

    Attributes:
        latent: [B, C, H, W], raw: what was decoded.
        output: [B, 3, H, W] in [-1, 1], may overshoot.
        losses: one unweighted loss [B] by its name.
        weighted: [B], that loss times its weight.
        monitors: numbers of the batch that are no losses.
    """

    latent: Float[Tensor, "b c h2 w2"]
    output: Float[Tensor, "b 3 h w"]
    losses: Mapping[str, Float[Tensor, " b"]]
    weighted: Float[Tensor, " b"]
    monitors: Mapping[str, Tensor] = field(default_factory=dict)


class Regularizer(Protocol):
    """Makes the latent that is decoded from the encoder's output, decodes it, and says what the latent costs."""

    def __call__(self, autoencoder: Reconstructing, posterior: Gaussian, random: Randomness) -> Regularized: ...


def kl_divergence(posterior: Gaussian) -> Float[Tensor, "b c h w"]:
    """KL(N(mean, std^2) || N(0, 1)) per element = 0.5 (mean^2 + std^2 - 1 - log std^2), in nats."""
    assert posterior.std is not None, "a KL term needs an encoder with a posterior"
    return 0.5 * (posterior.mean**2 + posterior.std**2 - 1) - posterior.std.log()


class KLRegularizer:
    """A draw from the posterior, and its KL divergence from a standard normal (Kingma & Welling, arXiv:1312.6114).

    z = mean + std n, n ~ N(0, 1) (stream ``posterior``); loss ``kl`` = weight x KL(N(mean, std^2) || N(0, 1)).

    Args:
        weight: of the term. 1e-6 in LDM and REPA-E, where KL is a sum over the latent's elements.
        reduction: 'sum' over the elements of a sample, or their 'mean'.
        latent_noise: standard deviation of more noise on z, times a level drawn from U[0, 1) per sample. It teaches
            the decoder to bear the imperfect latents of a diffusion model (as RAE does, arXiv:2510.11690).

    Raises:
        UserError: for another reduction.
    """

    def __init__(self, *, weight: float, reduction: Literal["mean", "sum"] = "sum", latent_noise: float = 0.0) -> None:
        if reduction not in REDUCTIONS:
            raise unknown_choice("objective.reconstruction.regularizer.reduction", reduction, REDUCTIONS)
        self.weight = weight
        self.latent_noise = latent_noise
        self._reduce = REDUCTIONS[reduction]

    def __call__(self, autoencoder: Reconstructing, posterior: Gaussian, random: Randomness) -> Regularized:
        """Draw, decode, measure."""
        latent = posterior.sample(random.normal("posterior", posterior.mean.shape[1:]))
        if self.latent_noise > 0:
            level = self.latent_noise * random.uniform("latent_noise_level").reshape(-1, 1, 1, 1)
            latent = latent + level * random.normal("latent_noise", latent.shape[1:])
        loss = self._reduce(kl_divergence(posterior).flatten(1), dim=1)
        return Regularized(latent, autoencoder.decode_unclamped(latent), {"kl": loss}, self.weight * loss)


class CodebookRegularizer:
    """The nearest codes, and how far encoder and codebook are from each other (van den Oord et al., arXiv:1711.00937).

    Loss ``codebook`` = weight x the quantizer's loss; monitors ``perplexity`` and ``codes_used`` of the batch.

    Args:
        weight: of the term; 1 in LDM.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, autoencoder: Quantizing, posterior: Gaussian, random: Randomness) -> Regularized:
        """Quantise, decode, measure; nothing is random."""
        codes = autoencoder.quantize(posterior.mean)
        return Regularized(
            codes.latent,
            autoencoder.decode_quantized(codes.latent),
            {"codebook": codes.loss},
            self.weight * codes.loss,
            autoencoder.code_usage(codes.indices),
        )
