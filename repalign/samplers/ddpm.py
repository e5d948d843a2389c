"""Ancestral sampling of a discrete chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.vp import DiscreteVPPath, Posterior
from repalign.protocols import Field, Randomness
from repalign.samplers.grid import initial_state
from repalign.state import Output, State, map_state


class DDPM:
    """x_{k-1} = posterior mean(x_0 estimate, x_k) + sqrt(variance) n, without noise in the step that ends at the data.

    Source: arXiv:2006.11239, with respaced steps and learned variance of arXiv:2102.09672 (ADM, DiT).

    Args:
        steps: which steps of the path's chain are taken, as a number or a respacing
            (:func:`repalign.paths.schedules.kept_steps`).
        variance: ``learned`` reads the backbone's head ``variance``, ``fixed_small`` is the posterior's,
            ``fixed_large`` is beta_k.
        clip: clamp the estimate of x_0 to [-1, 1]: right for pixels, wrong for latents.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: for an unknown variance, a path that is not discrete, or a backbone without the head ``variance``.
    """

    def __init__(
        self, steps: str | int = "250", variance: str = "learned", clip: bool = False, dtype: str = "float32"
    ) -> None:
        if variance not in VARIANCES:
            raise unknown_choice("sampler.variance", variance, VARIANCES, "variance")
        self.steps = steps
        self.variance = variance
        self.clip = clip
        self.dtype = dtype

    def __call__(
        self,
        field: Field,
        x_1: State,
        random: Randomness,
        *,
        trace: Callable[[State], None] | None = None,
        before_step: Callable[[State, Tensor, Randomness], State] | None = None,
    ) -> State:
        """Run the chain; the j-th step reads the stream ``noise`` of stage j. ``trace`` sees every new state.

        ``before_step`` changes the state before each step (:class:`repalign.samplers.known_region.KnownRegion`).
        """
        chain = discrete_path(field).respaced(self.steps)
        log_variance_of = VARIANCES[self.variance]
        x = initial_state(x_1, self.dtype)
        for j, index in enumerate(reversed(range(len(chain)))):
            if before_step is not None:
                x = before_step(x, chain.times[index], random.at(j))
            output = field(x, chain.times[index])
            x_0 = estimate_x_0(field, output, x, chain.times[index], self.clip)
            posterior = chain.posterior(torch.tensor(index))
            x_before = posterior.mean(x_0, x)
            if index > 0:
                std = map_state(lambda value: (0.5 * value).exp(), log_variance_of(posterior, output))
                x_before = x_before + std * random.at(j).normal_like("noise", x)
            x = x_before
            if trace is not None:
                trace(x)
        return x


def discrete_path(field: Field) -> DiscreteVPPath:
    """The field's path, when it is a discrete chain.

    Raises:
        UserError: when it is not.
    """
    if not isinstance(field.path, DiscreteVPPath):
        raise UserError(f"sampler: needs the discrete path, found {type(field.path).__name__}; set path=ddpm")
    return field.path


def estimate_x_0(field: Field, output: Output, x_t: State, t: Tensor, clip: bool) -> State:
    """The denoised estimate of x_0, clamped to [-1, 1] if asked for."""
    assert output.pred is not None, "a field that is sampled has a prediction"
    x_0 = field.parametrization.data(output.pred, x_t, field.path.coefficients(t))
    return map_state(lambda x: x.clamp(-1, 1), x_0) if clip else x_0


def _learned(posterior: Posterior, output: Output) -> State:
    if "variance" not in output.heads:
        raise UserError(
            "sampler.variance: 'learned' needs a backbone with the head 'variance'; set backbone.variance_head=true "
            "or sampler.variance=fixed_small|fixed_large"
        )
    return posterior.learned_log_variance(output.heads["variance"])


def _fixed_small(posterior: Posterior, output: Output) -> State:
    return posterior.log_variance


def _fixed_large(posterior: Posterior, output: Output) -> State:
    return posterior.log_beta


VARIANCES: Mapping[str, Callable[[Posterior, Output], State]] = {
    "learned": _learned,
    "fixed_small": _fixed_small,
    "fixed_large": _fixed_large,
}
