"""SiT."""

from __future__ import annotations

from lightning_modules.generative import Generative


class SiT(Generative):
    """Scalable Interpolant Transformers (Ma et al., ECCV 2024, arXiv:2401.08740).

    x_t = alpha_t x_0 + sigma_t eps; the network predicts velocity, noise or score; loss = mean (pred - target)^2;
    samples by the probability-flow ODE or an SDE whose diffusion is chosen after training.
    The base with nothing added: any path, any parametrization, no aligner.
    """

    def contract(self) -> None:
        self.require(not self.aligners, "trains without aligners; use method=repa, or aligner=none")
