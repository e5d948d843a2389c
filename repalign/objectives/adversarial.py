"""The adversarial term of a first stage, and the loss of its discriminator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import unknown_choice
from repalign.nn.precision import at_least_float32

# Weights that would blow a vanishing adversarial gradient up are cut here, as in VQGAN.
LARGEST = 1e4


def hinge(real: Float[Tensor, " *n"], fake: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
    """0.5 (max(0, 1 - D(x)) + max(0, 1 + D(x'))) per logit."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake))


def vanilla(real: Float[Tensor, " *n"], fake: Float[Tensor, " *n"]) -> Float[Tensor, " *n"]:
    """0.5 (softplus(-D(x)) + softplus(D(x'))) per logit."""
    return 0.5 * (F.softplus(-real) + F.softplus(fake))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge, "vanilla": vanilla}


class Adversarial:
    """A patch discriminator against the decoder (Esser et al., arXiv:2012.09841, section 3.1).

    Decoder: w_adv factor (-mean D(x')). With an adaptive weight, w_adv = weight x clamp(|g_nll| / (|g_adv| + 1e-4), 0,
    1e4), where g are the gradients of the reconstruction loss and of the adversarial loss at the decoder's last layer;
    else w_adv = weight (REPA-E). Discriminator: factor x hinge or vanilla loss. Nothing is adversarial before step
    ``start``. The discriminator runs in float32 under autocast too, as in the official code of REPA-E.

    Args:
        discriminator: pictures in [-1, 1] -> logits [B, 1, H, W]; trained by its own phase.
        weight: of the decoder's term.
        adaptive: balance the term against the reconstruction loss.
        factor: of both losses.
        start: first step with an adversarial term.
        loss: 'hinge' or 'vanilla', of the discriminator.

    Raises:
        UserError: for another loss.
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module,
        weight: float = 1.0,
        adaptive: bool = True,
        factor: float = 1.0,
        start: int = 0,
        loss: str = "hinge",
    ) -> None:
        if loss not in LOSSES:
            raise unknown_choice("objective.adversarial.loss", loss, LOSSES)
        self.discriminator = discriminator
        self.weight = weight
        self.adaptive = adaptive
        self.factor = factor
        self.start = start
        self._loss = LOSSES[loss]

    def factor_at(self, step: int) -> float:
        """``factor`` from ``start`` on, 0 before."""
        return self.factor if step >= self.start else 0.0

    def generator_loss(self, output: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """-mean D(x') of reconstructions in [-1, 1], with a gradient to them; without weight and factor."""
        return -self._logits(output).mean(1)

    def weight_of(
        self, reconstruction: Float[Tensor, ""], generator: Float[Tensor, ""], last_layer: nn.Parameter
    ) -> Float[Tensor, ""]:
        """w_adv, detached.

        Args:
            reconstruction: the batch mean of the reconstruction loss (without regularizer).
            generator: the batch mean of :meth:`generator_loss`.
            last_layer: the decoder's last weight, on which both depend.
        """
        if not self.adaptive:
            return torch.full_like(generator.detach(), self.weight)
        norms = [torch.autograd.grad(x, last_layer, retain_graph=True)[0].norm() for x in (reconstruction, generator)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, LARGEST).detach() * self.weight

    def discriminator_loss(
        self, target: Float[Tensor, "b 3 h w"], output: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, " b"], dict[str, Float[Tensor, " b"]]]:
        """The discriminator's loss, not multiplied by factor, and its mean logits ``real`` and ``fake``.

        Args:
            target: pictures in [-1, 1].
            output: their reconstructions; no gradient passes to them.
        """
        real, fake = self._logits(target.detach()), self._logits(output.detach())
        return self._loss(real, fake).mean(1), {"logits_real": real.mean(1), "logits_fake": fake.mean(1)}

    def _logits(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n"]:
        with torch.autocast(signed.device.type, enabled=False):
            return self.discriminator(at_least_float32(signed)).flatten(1)
