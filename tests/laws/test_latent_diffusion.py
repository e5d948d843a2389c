"""The loss of latent diffusion against its formula, and against the losses that the house has already."""

import math

import pytest
import torch

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.latent_diffusion import LatentDiffusionLoss, bound_weights
from repalign.objectives.variational import gaussian_kl
from repalign.paths.angular import AngularVelocity
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Noise, Velocity
from repalign.paths.time import UniformSteps
from repalign.paths.vp import DiscreteVPPath
from repalign.random import SampleRandom
from repalign.state import Cond, Streams
from tests.laws.exact import GaussianNetwork

PATH = DiscreteVPPath(1000, "scaled_linear", ends=(0.0015, 0.0195))
X_0 = SampleRandom(1, range(6)).normal("x", (2, 4, 4))


def losses(parametrization=None, path=PATH, **options):
    quantity = parametrization or Noise()
    objective = LatentDiffusionLoss(path, quantity, UniformSteps(path.steps), **options)
    draw = objective.draw(X_0, SampleRandom(0, range(6)))
    network = GaussianNetwork(PATH, quantity, dtype=torch.float32)
    return objective, objective(network, X_0, Cond(), draw), draw, network


@pytest.mark.parametrize("quantity", [Noise(), Data(), AngularVelocity()])
def test_the_plain_loss_is_denoising(quantity):
    objective, step, draw, network = losses(quantity)
    plain = Denoising(PATH, quantity, UniformSteps())(network, X_0, Cond(), draw)
    assert step.losses.keys() == {"denoising"}
    torch.testing.assert_close(step.losses["denoising"], plain.losses["denoising"])


def test_weights_and_log_variance_follow_the_formula():
    _, step, _, _ = losses(distance="l1", simple_weight=0.7, bound_weight=1e-3, log_variance=0.3)
    error = (step.output.pred - step.sample.eps).abs().flatten(1).mean(1)
    torch.testing.assert_close(step.losses["denoising"], 0.7 * (error / math.exp(0.3) + 0.3))
    weights = bound_weights(PATH, Noise())[PATH.step_of(step.sample.t)].float()
    torch.testing.assert_close(step.losses["variational"], 1e-3 * weights * error)


def test_the_bound_of_the_noise_is_the_divergence_of_the_posteriors():
    index = torch.tensor([1, 10, 500, 999])
    posterior = PATH.posterior(index)
    alpha, sigma = PATH.alphas_cumprod[index].sqrt(), (1 - PATH.alphas_cumprod[index]).sqrt()
    error = 0.3  # of the noise: x_0 is off by error sigma / alpha
    shift = posterior.weight_x_0 * error * sigma / alpha
    divergence = gaussian_kl(shift, posterior.log_variance, torch.zeros(4).double(), posterior.log_variance)
    torch.testing.assert_close(bound_weights(PATH, Noise())[index].double() * error**2, divergence, rtol=1e-3, atol=0)


def test_a_learned_log_variance_moves_towards_the_error():
    """At its best s_k is the logarithm of the mean error of step k, and the loss log(error) + 1."""
    objective, step, draw, network = losses(learn_log_variance=True)
    objective.log_variance.data.fill_(0.0)
    (gradient,) = torch.autograd.grad(step.losses["denoising"].sum(), objective.log_variance)
    index = PATH.step_of(draw.t)
    errors = step.losses["denoising"].detach()  # s = 0
    torch.testing.assert_close(gradient[index], 1 - errors)
    assert gradient.count_nonzero() == len(index.unique())
    assert not losses()[0].log_variance.requires_grad
    assert "log_variance" in objective.state_dict() and "bound" not in objective.state_dict()


def test_only_taps_leaves_the_losses_out_and_misuse_is_named():
    class Silent(GaussianNetwork):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return type(out)()

    objective, _, draw, _ = losses()
    assert objective(Silent(PATH, Noise()), X_0, Cond(), draw, only_taps=True).losses == {}
    with pytest.raises(UserError, match="several"):
        objective(Silent(PATH, Noise()), Streams(a=X_0), Cond(), draw)
    with pytest.raises(UserError, match="objective.bound_weight: no bound is known for Velocity"):
        losses(Velocity(), bound_weight=1.0)
    with pytest.raises(UserError, match="objective.distance"):
        losses(distance="l3")
    with pytest.raises(UserError, match="needs the discrete path"):
        LatentDiffusionLoss(LinearPath(), Noise(), UniformSteps())
