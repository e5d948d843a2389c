"""The loss of latent diffusion: simple loss under a learned uncertainty, plus a weighted bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError, unknown_choice
from repalign.nn.precision import at_least_float32
from repalign.objectives.denoising import Denoising
from repalign.paths.angular import AngularVelocity
from repalign.paths.parametrization import Data, Noise
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Backbone, Parametrization, Randomness, TimeSampler
from repalign.state import Cond, Draw, State, Step, Streams, map_state, mean_per_sample

DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class LatentDiffusionLoss(nn.Module):
    """l = mean |pred - target|^p at one random step k per sample, p = 2 or 1 (LDM, arXiv:2112.10752).

    losses: ``denoising`` = simple_weight (l / exp(s_k) + s_k), with the log variance s_k of step k; ``variational`` =
    bound_weight w_k l with the weights of the variational bound, :func:`bound_weights`, when bound_weight is not 0.
    Both [B], in float32 at least. s is trained if ``learn_log_variance``, and belongs to the objective: optimised with
    the network, not averaged.

    Official name of the arguments: l_simple_weight, original_elbo_weight, logvar_init, learn_logvar, loss_type.

    Args:
        path: the discrete path.
        parametrization: what the backbone predicts: Noise, Data or AngularVelocity.
        time_sampler: which times are trained (LDM: ``UniformSteps``).
        distance: ``l2``, or ``l1`` (LDM on churches, inpainting, semantic synthesis).
        simple_weight: see above.
        bound_weight: see above.
        log_variance: initial s.
        learn_log_variance: train s.

    Raises:
        UserError: for an unknown distance, a path that is not discrete, a bound for a prediction that has none, or a
            state of several streams.
    """

    def __init__(
        self,
        path: DiscreteVPPath,
        parametrization: Parametrization,
        time_sampler: TimeSampler,
        distance: str = "l2",
        simple_weight: float = 1.0,
        bound_weight: float = 0.0,
        log_variance: float = 0.0,
        learn_log_variance: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(path, DiscreteVPPath):
            raise UserError(f"objective: needs the discrete path, found {type(path).__name__}; set path=ldm or ddpm")
        if distance not in DISTANCES:
            raise unknown_choice("objective.distance", distance, DISTANCES, "distance")
        self.path = path
        self.parametrization = parametrization
        self.denoising = Denoising(path, parametrization, time_sampler)
        self.distance = DISTANCES[distance]
        self.simple_weight = simple_weight
        self.bound_weight = bound_weight
        weights = bound_weights(path, parametrization) if bound_weight else torch.zeros(len(path))
        self.bound: Tensor
        self.register_buffer("bound", weights.float(), persistent=False)
        self.log_variance = nn.Parameter(torch.full((len(path),), float(log_variance)), learn_log_variance)

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """The draw of the denoising loss."""
        return self.denoising.draw(x_0, random)

    def forward(
        self,
        backbone: Backbone,
        x_0: State,
        cond: Cond,
        draw: Draw,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
    ) -> Step:
        """One pass of the backbone; with ``only_taps`` there is no prediction and no loss."""
        if isinstance(x_0, Streams):
            raise UserError(
                "objective and streams do not go together: latent diffusion has one stream; set objective=denoising "
                "for several"
            )
        step = self.denoising(backbone, x_0, cond, draw, taps=taps, only_taps=only_taps)
        pred, sample = step.output.pred, step.sample
        if pred is None:
            return step
        assert sample is not None, "denoising makes a path sample"
        difference = map_state(at_least_float32, pred) - self.parametrization.target(sample)
        error = mean_per_sample(map_state(self.distance, difference))
        assert isinstance(error, Tensor)
        index = self.path.step_of(sample.t)
        log_variance = self.log_variance[index]
        losses = {"denoising": self.simple_weight * (error * torch.exp(-log_variance) + log_variance)}
        if self.bound_weight:
            losses["variational"] = self.bound_weight * self.bound[index] * error
        return Step(losses, step.output, sample)


def bound_weights(path: DiscreteVPPath, parametrization: Parametrization) -> Float[Tensor, " s"]:
    """Weights of the squared error in the variational bound, one for each step; the first has that of the second.

    Noise: beta^2 / (2 v (1 - beta) (1 - abar)) with the posterior's variance v. Data: sqrt(abar) / 2 / (2 - abar), as
    the official code computes it (the derivation asks for 2 (1 - abar) below). AngularVelocity: 1, as in the code of
    Stable Diffusion 2.

    Raises:
        UserError: for another prediction.
    """
    for quantity, weights in _BOUNDS.items():
        if isinstance(parametrization, quantity):
            w = weights(path)
            return torch.cat([w[1:2], w[1:]])
    raise UserError(
        f"objective.bound_weight: no bound is known for {type(parametrization).__name__}; set it to 0, or "
        "parametrization=noise|data|angular_velocity"
    )


def _of_noise(path: DiscreteVPPath) -> Tensor:
    # In float32, as the official code has its tables: near the data 1 - abar has few digits then.
    variance = path.posterior(torch.arange(len(path))).variance.float()
    return path.betas.float() ** 2 / (2 * variance * (1 - path.betas).float() * (1 - path.alphas_cumprod.float()))


def _of_data(path: DiscreteVPPath) -> Tensor:
    return 0.5 * path.alphas_cumprod.sqrt() / (2 - path.alphas_cumprod)


def _of_angular_velocity(path: DiscreteVPPath) -> Tensor:
    return torch.ones_like(path.betas)


_BOUNDS: Mapping[type, Callable[[DiscreteVPPath], Tensor]] = {
    Noise: _of_noise,
    Data: _of_data,
    AngularVelocity: _of_angular_velocity,
}
