"""LDM."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.paths.angular import AngularVelocity
from repalign.paths.parametrization import Data, Noise
from repalign.paths.vp import DiscreteVPPath

PREDICTIONS = (Noise, Data, AngularVelocity)


class LDM(Generative):
    """Latent diffusion (Rombach et al., CVPR 2022, arXiv:2112.10752).

    DDPM's chain of 1000 steps on an autoencoder's latents, with betas whose square roots are linear; a U-Net predicts
    the noise, its conditions attend or join the channels. l = mean |eps - eps_hat|^p; loss = mean l / exp(s_k) + s_k,
    s = 0 unless it is learned, plus a weighted variational bound. Latents are scaled by one number, 1 / standard
    deviation of the first batch or that of Stable Diffusion.
    The base with a contract: a discrete path, and a prediction that LDM knows. A conditioner and an objective with
    weights are optimised with the U-Net; as in the official code the average covers the U-Net alone.
    """

    def contract(self) -> None:
        self.require(
            isinstance(self.path, DiscreteVPPath), "needs the discrete path; set path=ldm (found another path)"
        )
        self.require(
            isinstance(self.parametrization, PREDICTIONS),
            "predicts noise, data or v; set parametrization=noise|data|angular_velocity",
        )
