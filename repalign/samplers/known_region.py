"""Filling in a picture with a network that was not trained for it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from repalign.paths.interpolant import scale
from repalign.protocols import Path, Randomness
from repalign.state import State, map_state


@dataclass(frozen=True)
class KnownRegion:
    """Before a step at time t: x <- mask (alpha_t x_0 + sigma_t n) + (1 - mask) x, with fresh noise n (LDM, RePaint).

    Give it as ``before_step`` to :class:`repalign.samplers.ddim.DDIM`, ``PLMS`` or ``DDPM``. n is the stream ``known``
    of the step's stage.

    Attributes:
        x_0: the known latent.
        mask: [B, 1, H, W], 1 where it is known.
        path: of the field that is sampled.
    """

    x_0: State
    mask: Float[Tensor, "b 1 h w"]
    path: Path

    def __call__(self, x: State, t: Tensor, random: Randomness) -> State:
        """The state with its known part at the noise of time t."""
        c = self.path.coefficients(t)
        known = scale(c.alpha, self.x_0) + scale(c.sigma, random.normal_like("known", self.x_0))
        return map_state(lambda k: self.mask * k, known) + map_state(lambda y: (1 - self.mask) * y, x)
