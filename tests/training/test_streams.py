"""What is diffused: x_0 of a batch with further streams, and pictures drawn from such a state."""

from dataclasses import dataclass

import torch

from repalign.autoencoders.pixels import Pixels
from repalign.conditioners.label import LabelConditioner
from repalign.encoders.streams import ClassToken, state_shape
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.euler import Euler
from repalign.state import Streams, Tokens, TokenSpec, latent_of
from repalign.training.generate import ImageGenerator, pure_noise
from repalign.training.step import features_of, latents_of, state_of, with_features
from tests.laws.exact import GaussianNetwork

SPEC = TokenSpec(5, (2, 2), prefix=1)


@dataclass
class Counting:
    """An encoder whose class token is the picture's mean, and which counts its calls."""

    spec: TokenSpec = SPEC
    calls: int = 0

    def __call__(self, images):
        self.calls += 1
        data = images.mean((1, 2, 3)).reshape(-1, 1, 1) + torch.arange(5.0).reshape(1, 5, 1)
        return Tokens(data.expand(-1, -1, 5), SPEC.grid, SPEC.prefix)


ENCODER = Counting()
SOURCES = {"class_token": ClassToken(features={"main": SPEC}, latent_shape=(3, 4, 4))}
BATCH = {"image": torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)}
RANDOM = SampleRandom(0, range(6))


def test_the_latent_alone_is_a_plain_state():
    x_0 = state_of(BATCH, Pixels(), {}, {}, RANDOM)
    assert isinstance(x_0, torch.Tensor) and torch.equal(x_0, latents_of(BATCH, Pixels(), RANDOM))
    assert latent_of(x_0) is x_0


def test_further_streams_stand_beside_it_and_share_the_encoder_with_aligners():
    encoders = {"main": Counting()}
    batch = with_features(BATCH, encoders, ["main"])
    x_0 = state_of(batch, Pixels(), encoders, SOURCES, RANDOM)
    aligned = features_of(batch, encoders)("main")
    assert encoders["main"].calls == 1
    assert isinstance(x_0, Streams) and list(x_0) == ["latent", "class_token"]
    assert torch.equal(x_0["latent"], latents_of(BATCH, Pixels(), RANDOM))
    assert torch.equal(x_0["class_token"], aligned.data[:, 0]) and aligned.prefix == 1
    assert "features/main" not in BATCH


def test_cached_tokens_are_read_instead_of_the_pictures():
    encoders = {"main": Counting()}
    cached = {"features/main": torch.full((6, 5, 5), 7.0), "moments_mean": torch.zeros(6, 3, 4, 4)}
    x_0 = state_of(with_features(cached, encoders, ["main"]), Pixels(), encoders, SOURCES, RANDOM)
    assert encoders["main"].calls == 0 and (x_0["class_token"] == 7).all()


def test_shapes_follow_from_the_sources():
    shape = state_shape((3, 4, 4), SOURCES)
    noise = pure_noise(shape, RANDOM)
    assert {name: tuple(value.shape) for name, value in noise.items()} == {
        "latent": (6, 3, 4, 4),
        "class_token": (6, 5),
    }
    assert torch.equal(pure_noise((3, 4, 4), RANDOM), RANDOM.normal("x_1", (3, 4, 4)))


def test_pictures_come_from_the_latent_and_do_not_depend_on_the_batch():
    generator = ImageGenerator(
        backbone=GaussianNetwork(LinearPath(), Velocity(), dtype=torch.float32).requires_grad_(False),
        path=LinearPath(),
        parametrization=Velocity(),
        conditioner=LabelConditioner(3),
        sampler=Euler(4),
        guidance=ClassifierFreeGuidance(1.5, stream_scales={"class_token": 1.0}),
        norm=Pixels().norm,
        autoencoder=Pixels(),
        latent_shape=state_shape((3, 4, 4), SOURCES),
    )
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    whole = generator(labels, RANDOM)
    assert whole.shape == (6, 3, 4, 4) and whole.unique().numel() > 50
    torch.testing.assert_close(generator(labels[2:5], SampleRandom(0, [2, 3, 4])), whole[2:5])
