"""The KL autoencoder of latent diffusion: published sizes, large pictures, precision."""

import copy

import pytest
import torch

from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import Statistics
from repalign.errors import UserError
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import compose


def sd(**options):
    torch.manual_seed(0)
    return SDAutoencoder(weights="random", norm=None, widths=(16, 16, 32), depth=1, groups=4, **options).eval()


@pytest.fixture(scope="module")
def pictures():
    """A pattern that repeats every 16 pixels, so that a tile sees what the whole picture shows."""
    pattern = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return pattern.repeat(1, 1, 12, 12)


@pytest.fixture(scope="module")
def plain(pictures):
    with torch.no_grad():
        latent = sd().encode(pictures).mean
        return latent, sd().decode(latent)


@pytest.mark.parametrize(
    ("choice", "parameters", "channels", "downsampling"),
    # REPA-E counts its two autoencoders; SD3's differs from SD's in the convolutions at the latent and around it.
    [
        ("sd_vae", 83_653_863, 4, 8),
        ("in_vae", 69_836_067, 32, 16),
        ("va_vae", 69_836_067, 32, 16),
        ("sd3_vae", 83_819_683, 16, 8),
    ],
)
def test_published_sizes(choice, parameters, channels, downsampling):
    cfg = compose([f"autoencoder={choice}", "autoencoder.weights=random"])
    check_composition(cfg)
    cfg.autoencoder.norm = None
    with torch.device("meta"):
        autoencoder = build(cfg.autoencoder, "autoencoder")
        moments = autoencoder.moments(torch.empty(1, 3, 256, 256))
    assert sum(p.numel() for p in autoencoder.parameters()) == parameters
    assert moments.shape == (1, 2 * channels, 256 // downsampling, 256 // downsampling)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"slice": True}, {"channels_last": True}, {"tile": 192}], ids=str)
def test_slices_memory_format_and_tiles_of_the_whole_change_nothing(options, pictures, plain):
    autoencoder = sd(**options)
    torch.testing.assert_close(autoencoder.encode(pictures).mean, plain[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(plain[0]), plain[1], atol=2e-5, rtol=1e-4)
    assert autoencoder.fingerprint == sd().fingerprint


@torch.no_grad()
def test_tiles_come_closer_to_the_whole_the_larger_they_are(pictures, plain):
    errors = []
    for tile in (64, 128):
        autoencoder = sd(tile=tile)
        latent, decoded = autoencoder.encode(pictures).mean, autoencoder.decode(plain[0])
        assert latent.shape == plain[0].shape and decoded.shape == plain[1].shape
        errors.append(
            ((latent - plain[0]).abs().mean() / plain[0].std(), (decoded - plain[1]).abs().mean() / plain[1].std())
        )
        # Where no other tile reaches, a tile is the picture that it shows.
        inside = 3 * tile // 4 // 4
        alone = sd().encode(pictures[:, :, :tile, :tile]).mean
        torch.testing.assert_close(latent[..., :inside, :inside], alone[..., :inside, :inside], atol=2e-5, rtol=1e-4)
    assert errors[1][0] < errors[0][0] and errors[1][1] < errors[0][1]
    assert errors[1][0] < 0.05 and errors[1][1] < 0.15


@torch.no_grad()
def test_half_precision_is_asked_for_and_close(pictures, plain):
    autoencoder = sd(decode_dtype="bfloat16")
    assert torch.equal(autoencoder.encode(pictures).mean, plain[0])
    decoded = autoencoder.decode(plain[0])
    assert decoded.dtype == torch.float32 and not torch.equal(decoded, plain[1])
    torch.testing.assert_close(decoded, plain[1], atol=0.08, rtol=0)
    assert (decoded - plain[1]).abs().mean() < 0.01
    latent = sd(encode_dtype="bfloat16").encode(pictures).mean
    assert latent.dtype == torch.float32
    assert 0 < (latent - plain[0]).abs().mean() / plain[0].std() < 0.05


@torch.no_grad()
def test_channels_last_in_bfloat16_is_close_to_float32(pictures, plain):
    """Within 2 % of the latents' spread and 1 % of the pixels' range on average."""
    fast = {"channels_last": True, "encode_dtype": "bfloat16", "decode_dtype": "bfloat16"}
    autoencoder = sd(**fast)
    weights = [p for p in autoencoder.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) and p.dtype == torch.float32 for p in weights)
    latent, decoded = autoencoder.encode(pictures).mean, autoencoder.decode(plain[0])
    assert latent.dtype == decoded.dtype == torch.float32
    assert 0 < (latent - plain[0]).abs().mean() / plain[0].std() < 0.02
    assert 0 < (decoded - plain[1]).abs().mean() < 0.01
    # Latents of another precision get a store of their own; what decodes them may differ.
    assert autoencoder.fingerprint == f"{sd().fingerprint}-bfloat16"
    assert sd(decode_dtype="bfloat16", channels_last=True).fingerprint == sd().fingerprint


def test_every_recipe_of_the_family_takes_them():
    for choice in ("sd_vae_ema", "sd3_vae", "e2e_vae"):
        words = ["channels_last=true", "encode_dtype=bfloat16", "decode_dtype=bfloat16", "weights=random"]
        cfg = compose([f"autoencoder={choice}", *(f"autoencoder.{word}" for word in words)])
        check_composition(cfg)
        with torch.device("meta"):
            cfg.autoencoder.norm = None
            assert build(cfg.autoencoder, "autoencoder").encode_dtype == torch.bfloat16


@torch.no_grad()
def test_surrounding_autocast_holds_in_training_alone(pictures, plain):
    autoencoder = sd()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.encode(pictures).mean, plain[0])
        assert autoencoder.train().moments(pictures).dtype == torch.bfloat16


def test_a_copy_is_independent(pictures):
    original = sd()
    copied = copy.deepcopy(original)
    assert copied.network.decoder is copied.decoder and copied.decoder is not original.decoder
    with torch.no_grad():
        copied.decoder.conv_out.bias.add_(1)
    assert copied.fingerprint != original.fingerprint == sd().fingerprint


def test_statistics_stored_with_the_weights_become_the_norm(tmp_path):
    original = sd()
    original.save(tmp_path / "own.safetensors", {"latent_mean": [0.5] * 4, "latent_std": [2.0] * 4}, torch.float32)
    loaded = SDAutoencoder(weights=tmp_path / "own.safetensors", norm=None, widths=(16, 16, 32), depth=1, groups=4)
    assert isinstance(loaded.norm, Statistics) and loaded.fingerprint == original.fingerprint
    assert original.norm is None


def test_options_that_do_not_fit():
    with pytest.raises(UserError, match=r"autoencoder\.tile: expected a multiple of 16 or null, found 50"):
        sd(tile=50)
    with pytest.raises(UserError, match=r"autoencoder\.decode_dtype: unknown choice 'bf16'"):
        sd(decode_dtype="bf16")
