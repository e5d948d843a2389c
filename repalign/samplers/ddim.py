"""Implicit sampling of a discrete chain."""

from __future__ import annotations

from collections.abc import Callable

import torch

from repalign.errors import UserError
from repalign.paths.interpolant import scale
from repalign.protocols import Field, Randomness
from repalign.samplers.ddpm import discrete_path, estimate_x_0
from repalign.samplers.grid import initial_state
from repalign.state import State


class DDIM:
    """x_{k-1} = sqrt(abar_{k-1}) x_0 + sqrt(1 - abar_{k-1} - s^2) eps + s n over a respaced chain.

    s = eta sqrt((1 - abar_{k-1}) / (1 - abar_k)) sqrt(1 - abar_k / abar_{k-1}); abar before the first step is 1, so the
    last step returns x_0. x_0 and eps are those of the field's prediction; eps is derived again from a clipped x_0.

    Source: arXiv:2010.02502, equations 12 and 16, as ADM and DiT run it. A learned variance is not used.

    Args:
        steps: which steps of the path's chain are taken, as a number or a respacing
            (:func:`repalign.paths.schedules.kept_steps`; ``ddim50`` for the paper's stride).
        eta: 0 is deterministic, 1 has DDPM's variance.
        clip: clamp the estimate of x_0 to [-1, 1]: right for pixels, wrong for latents.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: when eta is not in [0, 1] or the path is not discrete.
    """

    def __init__(self, steps: str | int = "50", eta: float = 0.0, clip: bool = False, dtype: str = "float32") -> None:
        if not 0 <= eta <= 1:
            raise UserError(f"sampler.eta must be in [0, 1], found {eta}")
        self.steps = steps
        self.eta = eta
        self.clip = clip
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Run the chain; the j-th step reads the stream ``noise`` of stage j if eta > 0. ``trace`` sees every state."""
        chain = discrete_path(field).respaced(self.steps)
        alpha_bar = chain.alphas_cumprod
        alpha_bar_before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
        x = initial_state(x_1, self.dtype)
        for j, index in enumerate(reversed(range(len(chain)))):
            now, before = alpha_bar[index], alpha_bar_before[index]
            x_0 = estimate_x_0(field, field(x, chain.times[index]), x, chain.times[index], self.clip)
            eps = scale(1 / (1 - now).sqrt(), x - scale(now.sqrt(), x_0))
            spread = self.eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
            x = scale(before.sqrt(), x_0) + scale((1 - before - spread**2).clamp(min=0).sqrt(), eps)
            if self.eta > 0 and index > 0:
                x = x + scale(spread, random.at(j).normal_like("noise", x))
            if trace is not None:
                trace(x)
        return x
