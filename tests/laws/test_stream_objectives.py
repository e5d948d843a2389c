"""Weights and dropout of streams."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.streams import StreamDropout, WeightedStreams
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.random import SampleRandom
from repalign.state import Cond, Output, Streams, map_state

RANDOM = SampleRandom(0, range(8))
X_0 = Streams(latent=RANDOM.normal("a", (4, 2, 2)), features=RANDOM.normal("b", (3, 2, 2)))
PLAIN = Denoising(LinearPath(), Velocity(), Uniform())


class Echo:
    """Predicts the state, and keeps it."""

    tap_specs: dict = {}
    uses_carry = False

    def __call__(self, x_t, t, cond, **_):
        self.seen = x_t
        return Output(map_state(lambda x: 1.0 * x, x_t))


def run(objective, random=RANDOM):
    network = Echo()
    draw = objective.draw(X_0, random)
    return objective(network, X_0, Cond(), draw), draw, network.seen


def test_each_stream_has_its_weight_and_one_where_none_is_named():
    plain, _, _ = run(PLAIN)
    weighted, _, _ = run(WeightedStreams(PLAIN, {"features": 0.03}))
    assert torch.equal(weighted.losses["denoising/latent"], plain.losses["denoising/latent"])
    torch.testing.assert_close(weighted.losses["denoising/features"], 0.03 * plain.losses["denoising/features"])


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("noise", [True, False])
def test_a_hidden_stream_is_noise_or_nothing_and_counts_nothing(per, noise):
    plain, _, shown = run(PLAIN)
    dropout = StreamDropout("features", 0.5, per, noise)
    hidden, draw, seen = run(WeightedStreams(PLAIN, {"features": 2.0}, dropout))
    dropped = draw.drop["stream/features"]
    assert dropped.unique().numel() == (1 if per == "batch" else 2)
    assert torch.equal(seen["latent"], shown["latent"])
    assert torch.equal(seen["features"][~dropped], shown["features"][~dropped])
    left = draw.t.reshape(-1, 1, 1, 1) * draw.eps["features"] if noise else torch.zeros_like(X_0["features"])
    torch.testing.assert_close(seen["features"][dropped], left[dropped])
    losses = hidden.losses["denoising/features"]
    assert (losses[dropped] == 0).all()
    torch.testing.assert_close(losses[~dropped], 2 * plain.losses["denoising/features"][~dropped])


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability):
    for serial in range(20):
        random = SampleRandom(1, [serial, serial + 100])
        assert (StreamDropout("features", probability).draw(random) == bool(probability)).all()


def test_coins_per_sample_do_not_depend_on_the_batch():
    dropout = StreamDropout("features", 0.5, "sample")
    whole = dropout.draw(RANDOM)
    parts = [dropout.draw(SampleRandom(0, part)) for part in ([0, 1, 2], [3, 4, 5, 6, 7])]
    assert torch.equal(torch.cat(parts), whole)


def test_mistakes_name_the_key():
    with pytest.raises(UserError, match="objective.weights: unknown stream 'feature'. Did you mean 'features'"):
        run(WeightedStreams(PLAIN, {"feature": 1.0}))
    with pytest.raises(UserError, match="objective.dropout.stream: unknown stream 'class_token'"):
        run(WeightedStreams(PLAIN, {}, StreamDropout("class_token", 0.1)))
    with pytest.raises(UserError, match="objective.dropout.probability"):
        StreamDropout("features", 1.2)
    with pytest.raises(UserError, match="objective.dropout.per"):
        StreamDropout("features", 0.2, "rank")
    with pytest.raises(UserError, match="set streams="):
        objective = WeightedStreams(PLAIN, {"features": 1.0})
        objective(Echo(), X_0["latent"], Cond(), objective.draw(X_0["latent"], RANDOM))
