"""The hybrid loss of improved DDPM and DiT: noise prediction plus learned variance."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from repalign.errors import UserError
from repalign.nn.precision import at_least_float32
from repalign.objectives.denoising import Denoising
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Backbone, Parametrization, Randomness, TimeSampler
from repalign.state import Cond, Draw, State, Step, expand, map_state, stream_by_stream


class VariationalDenoising:
    """Denoising loss plus the variational bound of one step, for a backbone with a head ``variance`` (DiT, ADM).

    losses: ``denoising`` = mean |pred - target|^2 and ``variational`` = the bound in bits per dimension, both [B]:
    KL(q(x_{k-1} | x_k, x_0) || N(mean, exp(log variance))) for k > 0 and the discretised-Gaussian negative
    log-likelihood of x_0 at k = 0, averaged over [C, H, W] and divided by ln 2. The prediction is detached in the
    bound, so that it trains the variance alone; x_0 is not clipped. The log variance lies between that of the posterior
    and log beta_k, see :meth:`repalign.paths.vp.Posterior.learned_log_variance`.

    A state of several streams gives ``variational/<stream>`` for each, as ``denoising`` does.

    Source: arXiv:2102.09672, equations 14-16, in the form of DiT (arXiv:2212.09748).

    Args:
        path: the discrete path; a respaced one trains the kept steps alone.
        parametrization: what the backbone predicts (DiT: Noise).
        time_sampler: which times are trained (DiT: ``UniformSteps``).
        variational_weight: factor of the bound; 1 in DiT, steps / 1000 in ADM's rescaled loss.

    Raises:
        UserError: when the path is not discrete, or the backbone has no head ``variance``.
    """

    def __init__(
        self,
        path: DiscreteVPPath,
        parametrization: Parametrization,
        time_sampler: TimeSampler,
        variational_weight: float = 1.0,
    ) -> None:
        if not isinstance(path, DiscreteVPPath):
            raise UserError(
                f"objective: a learned variance needs the discrete path, found {type(path).__name__}; set path=ddpm"
            )
        self.path = path
        self.parametrization = parametrization
        self.variational_weight = variational_weight
        self.denoising = Denoising(path, parametrization, time_sampler)

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """The draw of the denoising loss."""
        return self.denoising.draw(x_0, random)

    def __call__(
        self,
        backbone: Backbone,
        x_0: State,
        cond: Cond,
        draw: Draw,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
    ) -> Step:
        """One pass of the backbone, two losses."""
        step = self.denoising(backbone, x_0, cond, draw, taps=taps, only_taps=only_taps)
        pred, sample = step.output.pred, step.sample
        if pred is None:
            return step
        if "variance" not in step.output.heads:
            raise UserError(
                "objective and backbone do not go together: a learned variance needs a backbone with a head "
                "'variance'; set backbone.variance_head=true (backbone=sit_*, sit_down_*), or objective=denoising"
            )
        head = step.output.heads["variance"]
        assert sample is not None, "denoising makes a path sample"

        index = self.path.step_of(sample.t)
        posterior = self.path.posterior(index)
        detached = map_state(lambda x: at_least_float32(x.detach()), pred)
        x_0_hat = self.parametrization.data(detached, sample.x_t, sample.coefficients)
        predicted = (
            posterior.mean(x_0_hat, sample.x_t),
            posterior.learned_log_variance(map_state(at_least_float32, head)),
        )
        true = posterior.mean(x_0, sample.x_t), expand(posterior.log_variance, x_0)
        losses = dict(step.losses)
        for stream, tensors in stream_by_stream(x_0, *predicted, *true).items():
            data, mean, log_variance, true_mean, true_log_variance = tensors
            divergence = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
            likelihood = discretised_log_likelihood(data, mean, 0.5 * log_variance).flatten(1).mean(1)
            bound = torch.where(index == 0, -likelihood, divergence) / math.log(2)
            name = f"variational/{stream}" if stream else "variational"
            losses[name] = self.variational_weight * bound
        return Step(losses, step.output, sample)


def gaussian_kl(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(N(mean_p, exp log_variance_p) || N(mean_q, exp log_variance_q)) in nats, entry-wise."""
    ratio = log_variance_p - log_variance_q
    return 0.5 * (torch.exp(ratio) - 1 - ratio + (mean_p - mean_q) ** 2 * torch.exp(-log_variance_q))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x in [-1, 1] under a Gaussian, entry-wise, in nats.

    The outermost bins (|x| > 0.999) reach to infinity; probabilities are floored at 1e-12. The cumulative distribution
    is the tanh approximation of the official codes. DiT applies it to latents although they are no pixels.
    """

    def cumulative(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse_std = torch.exp(-log_std)
    upper = cumulative(inverse_std * (x - mean + 1 / 255))
    lower = cumulative(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
