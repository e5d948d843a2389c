"""The two losses of a first stage: the autoencoder's and its discriminator's."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from repalign.objectives.adversarial import Adversarial
from repalign.objectives.reconstruction import Reconstructed, Reconstruction
from repalign.objectives.regularizers import Reconstructing
from repalign.protocols import Randomness
from repalign.state import Losses


class FirstStage:
    """Reconstruction with or without an adversary: what trains the autoencoder of a latent model.

    Autoencoder: mean (nll + regularizer) + w_adv factor (-mean D(x')); discriminator: factor x hinge or vanilla loss on
    the same reconstruction.
    Deviation from the official code of LDM: there the discriminator's step encodes and decodes once more, with the
    autoencoder already moved and fresh posterior noise. Here both read one pass, which halves the cost.

    Args:
        reconstruction: the reconstruction loss.
        adversarial: the discriminator's side; None for none.
    """

    def __init__(self, *, reconstruction: Reconstruction, adversarial: Adversarial | None = None) -> None:
        self.reconstruction = reconstruction
        self.adversarial = adversarial

    def reconstruct(
        self, autoencoder: Reconstructing, images: Float[Tensor, "b 3 h w"], random: Randomness
    ) -> Reconstructed:
        """The pass that both losses share; ``images`` in [0, 1]."""
        return self.reconstruction(autoencoder, images, random)

    def autoencoder_loss(self, autoencoder: Reconstructing, shared: Reconstructed, step: int) -> Losses:
        """What the autoencoder minimises at a step.

        Args:
            autoencoder: whose last layer an adaptive weight looks at.
            shared: of :meth:`reconstruct`.
            step: finished rounds.
        """
        total = shared.total.mean()
        terms = {name: loss.mean() for name, loss in shared.losses.items()}
        terms |= {name: value.float() for name, value in shared.monitors.items()}
        if self.adversarial is not None and (factor := self.adversarial.factor_at(step)) > 0:
            generator = self.adversarial.generator_loss(shared.output).mean()
            weight = self.adversarial.weight_of(shared.nll.mean(), generator, autoencoder.last_layer)
            total = total + factor * weight * generator
            terms |= {"adversarial": generator, "adversarial_weight": weight}
        return Losses(total, terms)

    def discriminator_loss(self, shared: Reconstructed, step: int) -> Losses:
        """What the discriminator minimises at a step; no gradient passes to the autoencoder."""
        assert self.adversarial is not None, "a discriminator's loss needs an adversarial term"
        loss, logits = self.adversarial.discriminator_loss(shared.target, shared.output)
        return Losses(
            self.adversarial.factor_at(step) * loss.mean(), {name: value.mean() for name, value in logits.items()}
        )
