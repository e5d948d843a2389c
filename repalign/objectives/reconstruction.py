"""How well an autoencoder restores pictures: the reconstruction loss of a first stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import unknown_choice
from repalign.nn.precision import at_least_float32
from repalign.objectives.regularizers import REDUCTIONS, Reconstructing, Regularizer
from repalign.protocols import Randomness
from repalign.state import Gaussian

# Two batches of pictures in [-1, 1] -> their distances [B]: LPIPS, or another network's.
Perceptual = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reconstructed:
    """One pass through the autoencoder with its losses; other terms (adversarial, alignment) read it too.

    Attributes:
        posterior: what the encoder returned.
        latent: raw latents that were decoded.
        target, output: [B, 3, H, W] in [-1, 1]: pictures, and reconstructions with their gradient, which may overshoot.
        losses: unweighted terms [B] by name: ``l1``, ``mse``, ``perceptual`` as means over elements; ``kl`` or
            ``codebook``.
        nll: [B], the reconstruction loss without regularizer.
        total: [B], with it.
        monitors: numbers of the batch that are no losses.
    """

    posterior: Gaussian
    latent: Float[Tensor, "b c h2 w2"]
    target: Float[Tensor, "b 3 h w"]
    output: Float[Tensor, "b 3 h w"]
    losses: Mapping[str, Float[Tensor, " b"]]
    nll: Float[Tensor, " b"]
    total: Float[Tensor, " b"]
    monitors: Mapping[str, Tensor]

    @property
    def images(self) -> Float[Tensor, "b 3 h w"]:
        """The reconstructions in [0, 1]."""
        return ((self.output.detach() + 1) / 2).clamp(0, 1)


class Reconstruction:
    """Pixel errors, a perceptual distance and a regularizer of the latents (arXiv:2112.10752, section 3.1, appendix G).

    With x in [-1, 1], its reconstruction x' and E = number of the picture's elements (3HW):

        rec = w_l1 mean |x - x'| + w_mse mean (x - x')^2 + w_p p(x, x')
        nll = S (exp(-s) rec + s),   S = E for reduction 'sum', 1 for 'mean'
        total = nll + regularizer

    All of it in float32 at least, whatever the autocast precision of the autoencoder.
    LDM adds p, one number per picture, to the error of every element before it sums: hence its factor E.
    KL first stage of LDM: 'sum', w_l1 = w_p = 1, KL weight 1e-6; VQ first stage: 'mean', codebook weight 1; REPA-E:
    'mean' with LDM's KL. A KL weight goes with its reduction: 1e-6 against a sum of 196,608 elements is nothing against
    their mean.

    Args:
        regularizer: see :mod:`repalign.objectives.regularizers`.
        l1, mse: weights of the pixel errors.
        perceptual: distance of two batches in [-1, 1]; None for none.
        perceptual_weight: w_p.
        reduction: of the reconstruction loss over a picture's elements, 'mean' or 'sum'.
        log_variance: s of the pixels' likelihood. LDM declares it a parameter but gives it to no optimizer, so it is a
            number here.

    Raises:
        UserError: for another reduction.
    """

    def __init__(
        self,
        *,
        regularizer: Regularizer,
        l1: float = 1.0,
        mse: float = 0.0,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        log_variance: float = 0.0,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise unknown_choice("objective.reconstruction.reduction", reduction, REDUCTIONS)
        self.regularizer = regularizer
        self.weights = {"l1": l1, "mse": mse, "perceptual": perceptual_weight}
        self.perceptual = perceptual
        self.reduction = reduction
        self.log_variance = log_variance

    def __call__(
        self, autoencoder: Reconstructing, images: Float[Tensor, "b 3 h w"], random: Randomness
    ) -> Reconstructed:
        """Encode, regularise, decode, compare.

        Args:
            autoencoder: with gradients.
            images: in [0, 1].
            random: one stream per sample.
        """
        posterior = autoencoder.encode(images)
        regularized = self.regularizer(autoencoder, posterior, random)
        target, output = images * 2 - 1, at_least_float32(regularized.output)
        difference = (output - target).flatten(1)
        losses = {"l1": difference.abs().mean(1), "mse": difference.square().mean(1)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(target, output)
        rec = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum(0)
        elements = difference.shape[1] if self.reduction == "sum" else 1
        nll = elements * (rec * math.exp(-self.log_variance) + self.log_variance)
        return Reconstructed(
            posterior=posterior,
            latent=regularized.latent,
            target=target,
            output=output,
            losses={**losses, **regularized.losses},
            nll=nll,
            total=nll + regularized.weighted,
            monitors=regularized.monitors,
        )
