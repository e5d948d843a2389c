"""REPA."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.aligners.targets import EncoderTarget, unwrapped


class REPA(Generative):
    """Representation Alignment for Generation (Yu et al., ICLR 2025, arXiv:2410.06940).

    loss = mean |v(x_t, t, y) - (eps - x_0)|^2 - lambda mean_n cos(h(z_n), f(image)_n): z is the hidden state after a
    block of the denoiser on the noisy latent, h a three-layer MLP, f a frozen encoder on the clean image, lambda 0.5.
    Differs from the base by its contract alone: at least one aligner with an encoder's tokens as target.
    """

    def contract(self) -> None:
        encoded = [a for a in self.aligners.values() if isinstance(unwrapped(a.target), EncoderTarget)]
        self.require(bool(encoded), "needs an aligner with an encoder target; set aligner=repa (and encoder=...)")
