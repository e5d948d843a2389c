"""The borders that every autoencoder keeps, and the two KL autoencoders behind them."""

import math

import pytest
import torch

from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.pixels import Pixels
from repalign.autoencoders.posterior import from_log_variance, from_std
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.autoencoders.statistics import measure
from repalign.autoencoders.vq import VQAutoencoder
from repalign.errors import UserError
from repalign.state import Gaussian


def sd(**changed):
    sizes = {"channels": 4, "widths": (8, 16, 16, 16), "depth": 1, "groups": 4}
    return SDAutoencoder(weights="random", norm=ScaleShift(0.18215), **{**sizes, **changed})


def small(**changed):
    return SmallKLAutoencoder(weights="random", **{"width": 16, "norm": ScaleShift(0.5), **changed})


def vq(**changed):
    sizes = {"codes": 16, "channels": 4, "widths": (8, 8, 16), "depth": 1, "groups": 4}
    return VQAutoencoder(weights="random", norm=ScaleShift(1.0), **{**sizes, **changed})


BUILDERS = {
    "sd": sd,
    "sd3": lambda: sd(channels=16, quant=False),
    "ldm f4, attention": lambda: sd(channels=3, widths=(8, 8, 8), attention_levels=[2], z_channels=5),
    "small f8": small,
    "small f4": lambda: small(downsampling=4),
    "small f16": lambda: small(downsampling=16, channels=16),
    "vq f4": vq,
    "vq f4, attention": lambda: vq(channels=3, attention_levels=[2], z_channels=5),
    "pixels": Pixels,
}


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=BUILDERS)
def autoencoder(request):
    torch.manual_seed(0)
    return BUILDERS[request.param]().eval()


def test_shapes_and_ranges_at_the_borders(autoencoder, images):
    posterior = autoencoder.encode(images)
    side = 32 // autoencoder.downsampling
    assert posterior.mean.shape == (2, autoencoder.channels, side, side)
    assert posterior.std is None or (posterior.std > 0).all()
    decoded = autoencoder.decode(10 * posterior.mean)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() and decoded.max() <= 1
    latent = autoencoder.norm.normalize(posterior.mean)
    torch.testing.assert_close(autoencoder.norm.denormalize(latent), posterior.mean)


def test_fingerprint_stands_for_the_weights(autoencoder):
    before = autoencoder.fingerprint
    assert before == autoencoder.fingerprint
    if any(True for _ in autoencoder.parameters()):
        with torch.no_grad():
            next(autoencoder.parameters()).view(-1)[0] += 0.5
        assert autoencoder.fingerprint != before


def test_pixels_are_their_own_latents(images):
    pixels = Pixels()
    posterior = pixels.encode(images)
    assert posterior.std is None and posterior.mean.min() < -0.9
    torch.testing.assert_close(pixels.decode(posterior.mean), images)


def test_batch_rows_do_not_mix(images):
    autoencoder = small().eval()
    whole = autoencoder.encode(images).mean
    torch.testing.assert_close(whole[1:], autoencoder.encode(images[1:]).mean, atol=1e-6, rtol=1e-5)


def test_posterior_of_log_variance_and_of_std():
    moments = torch.tensor([1.0, 2.0, math.log(4.0), 99.0]).reshape(1, 4, 1, 1)
    posterior = from_log_variance(moments)
    torch.testing.assert_close(posterior.mean.flatten(), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(posterior.std.flatten(), torch.tensor([2.0, math.exp(10.0)]))  # 99 is clamped to 20
    assert from_log_variance(-moments * 99).std[0, 1].item() == pytest.approx(math.exp(-15.0))
    noise = torch.full((1, 2, 1, 1), 0.5)
    torch.testing.assert_close(from_std(moments).sample(noise).flatten(), torch.tensor([1 + math.log(4.0) / 2, 51.5]))


def test_measured_statistics(images):
    class Known:
        """Latent = 2 image - 1 with std 0.5; decodes with an error of 0.1."""

        def encode(self, images):
            mean = images * 2 - 1
            return Gaussian(mean, torch.full_like(mean, 0.5))

        def decode(self, raw):
            return (raw + 1) / 2 + 0.1

    restored = []
    found = measure(Known(), [images[:1], images[1:]], lambda given, made: restored.append(made - given))
    mean = images.double() * 2 - 1
    expected = (mean.var((0, 2, 3), correction=0) + 0.25).sqrt()
    assert found["pictures"] == 2
    torch.testing.assert_close(torch.tensor(found["latent_mean"], dtype=torch.float64), mean.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(found["latent_std"], dtype=torch.float64), expected)
    assert found["posterior_std"] == pytest.approx(0.5)
    torch.testing.assert_close(torch.cat(restored), torch.full_like(images, 0.1))
    with pytest.raises(ValueError, match="no picture"):
        measure(Known(), [])


def test_impossible_sizes():
    with pytest.raises(UserError, match=r"autoencoder\.downsampling: expected a power of two from 4, found 6"):
        small(downsampling=6)
    with pytest.raises(UserError, match=r"autoencoder\.width: expected a multiple of 16, found 20"):
        small(width=20)
