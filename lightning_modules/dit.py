"""DiT."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.paths.vp import DiscreteVPPath


class DiT(Generative):
    """Diffusion Transformers (Peebles and Xie, ICCV 2023, arXiv:2212.09748).

    DDPM with 1000 linear betas; the network predicts the noise and the log variance between beta_t and the posterior's;
    loss = mean (eps - eps_hat)^2 + variational bound in bits per dimension with eps_hat detached.
    """

    def contract(self) -> None:
        self.require(
            isinstance(self.path, DiscreteVPPath), "needs the discrete path; set path=ddpm (found another path)"
        )
