"""Guidance of several streams: a scale for each, and the prediction without one of them."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance, guide
from repalign.guidance.representation import RepresentationGuidance
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.adaptive import Adaptive
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.field import DenoisingField
from repalign.samplers.heun import Heun
from repalign.state import Cond, Output, Streams
from tests.laws.exact import PATHS, GaussianNetwork, exact_field

RANDOM = SampleRandom(3, range(3))
X_1 = Streams(latent=RANDOM.normal("x_1", (4, 2, 2), torch.float64), token=RANDOM.normal("y_1", (5,), torch.float64))
COND, NULL = Cond(torch.tensor([1, 2, 3])), Cond(torch.tensor([0, 0, 0]))
T = torch.tensor(0.5, dtype=torch.float64)


def bind(cond):
    network = GaussianNetwork(PATHS["linear"], Velocity()).requires_grad_(False)
    return DenoisingField(network, PATHS["linear"], Velocity(), cond)


class Named:
    """The same noise for a stream whether it stands alone or beside others."""

    def __init__(self, random, name):
        self.random, self.name = random, name

    def at(self, stage):
        return Named(self.random.at(stage), self.name)

    def normal_like(self, name, state):
        return self.random.normal(f"{name}/{self.name}", state.shape[1:], state.dtype)


@pytest.mark.parametrize(
    "sampler",
    [Euler(5), Heun(4, dtype="float64"), EulerMaruyama(5), EulerMaruyama(4, method="heun"), Adaptive("rk4", steps=3)],
)
def test_samplers_do_to_streams_what_they_do_to_each_of_them(sampler):
    field = exact_field(PATHS["linear"], Velocity(), COND)
    together = sampler(field, X_1, RANDOM)
    assert isinstance(together, Streams)
    for name in X_1:
        torch.testing.assert_close(together[name], sampler(field, X_1[name], Named(RANDOM, name)), rtol=0, atol=0)


def test_a_scale_of_one_is_no_guidance_stream_by_stream():
    plain, null = bind(COND)(X_1, T).pred, bind(NULL)(X_1, T).pred
    some = ClassifierFreeGuidance(2.0, stream_scales={"token": 1.0})(bind, COND, NULL)(X_1, T).pred
    assert torch.equal(some["token"], plain["token"])
    torch.testing.assert_close(some["latent"], null["latent"] + 2 * (plain["latent"] - null["latent"]))
    other = ClassifierFreeGuidance(1.0, stream_scales={"token": 3.0})(bind, COND, NULL)(X_1, T).pred
    assert torch.equal(other["latent"], plain["latent"])
    torch.testing.assert_close(other["token"], null["token"] + 3 * (plain["token"] - null["token"]))
    off = ClassifierFreeGuidance(1.0, stream_scales={"token": 1.0})(bind, COND, NULL)
    assert isinstance(off, DenoisingField)


def test_scales_of_streams_that_are_not_there():
    with pytest.raises(UserError, match=r"guidance.stream_scales: unknown stream 'tokn'. Did you mean 'token'"):
        guide(X_1, X_1, 2.0, stream_scales={"tokn": 1.0})
    with pytest.raises(UserError, match="guidance.stream_scales: the state has one stream"):
        guide(X_1["latent"], X_1["latent"], 2.0, stream_scales={"token": 1.0})


class Mixing(torch.nn.Module):
    """latent' = label latent + sum(token), token' = 2 token: the latent hears of the token."""

    tap_specs: dict = {}
    uses_carry = False

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, cond, **_):
        self.calls.append(len(t))
        heard = x_t["token"].sum(1).reshape(-1, 1, 1, 1)
        latent = cond.label.reshape(-1, 1, 1, 1) * x_t["latent"] + heard
        return Output(Streams(latent=latent, token=2 * x_t["token"]))


def test_representation_guidance_goes_away_from_the_prediction_without_the_stream():
    network = Mixing()

    def bind(cond):
        return DenoisingField(network, LinearPath(), Velocity(), cond)

    x_t = X_1.map(torch.Tensor.float)
    plain = bind(COND)(x_t, T).pred
    network.calls.clear()
    guided = RepresentationGuidance(1.5, "token")(bind, COND, NULL)(x_t, T).pred
    assert network.calls == [6]
    without = COND.label.reshape(-1, 1, 1, 1) * x_t["latent"]
    torch.testing.assert_close(guided["latent"], without + 1.5 * (plain["latent"] - without))
    torch.testing.assert_close(guided["token"], 1.5 * plain["token"])  # there it predicts 0
    network.calls.clear()
    outside = RepresentationGuidance(1.5, "token", interval=(0.6, 1.0))(bind, COND, NULL)(x_t, T).pred
    assert network.calls == [3] and torch.equal(outside["latent"], plain["latent"])
    assert isinstance(RepresentationGuidance(1.0, "token")(bind, COND, NULL), DenoisingField)


def test_representation_guidance_needs_the_stream():
    for x_t, words in ((X_1, "unknown stream 'features'"), (X_1["latent"], "has one stream")):
        with pytest.raises(UserError, match=f"guidance.stream: .*{words}"):
            RepresentationGuidance(1.5)(bind, COND, NULL)(x_t, T)
    with pytest.raises(UserError, match="guidance.interval"):
        RepresentationGuidance(1.5, interval=(0.9, 0.2))
