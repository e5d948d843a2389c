"""The weights that lie in the repository."""

from pathlib import Path

import pytest
import torch

from datamodules.openmoji import catalogue, render
from repalign.autoencoders.latent_norm import Statistics
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.autoencoders.statistics import measure
from repalign.metrics.reconstruction import ReconstructionMetrics

FILE = Path(__file__).parents[2] / "assets" / "autoencoders" / "openmoji_kl_f8c8.safetensors"


@pytest.fixture(scope="module")
def shipped():
    return SmallKLAutoencoder(weights=FILE).eval()


@pytest.fixture(scope="module")
def pictures():
    chosen = catalogue()[::60]
    return torch.stack([torch.from_numpy(render(path, 64).copy()) for path, _, _ in chosen]).float() / 255


def test_restores_pictures(shipped, pictures):
    metrics = ReconstructionMetrics()
    measure(shipped, [pictures], metrics.update)
    found = metrics.compute()
    assert found["l1"] < 0.02 and found["psnr"] > 25


def test_normalised_latents_have_unit_scale(shipped, pictures):
    with torch.no_grad():
        latent = shipped.norm.normalize(shipped.encode(pictures).mean)
    assert latent.shape == (len(pictures), 8, 8, 8)
    assert 0.8 < latent.std() < 1.2 and latent.mean().abs() < 0.2


def test_bears_imperfect_latents(shipped, pictures):
    """A diffusion model's latents are a little off; the picture must stay close."""
    with torch.no_grad():
        latent = shipped.norm.normalize(shipped.encode(pictures).mean)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        decoded = shipped.decode(shipped.norm.denormalize(latent + 0.2 * noise))
    assert (decoded - pictures).abs().mean() < 0.03


def test_says_where_it_comes_from(shipped):
    assert isinstance(shipped.norm, Statistics)
    assert FILE.stat().st_size < 6 * 2**20
    told = shipped.provenance
    assert {"commit", "date", "steps", "batch_size", "seed", "objective", "optimizer", "versions"} <= told.keys()
    assert told["commit"] and told["steps"] > 1000
    assert "CC-BY-SA 4.0" in told["licence"] or "by-sa/4.0" in told["licence"].lower()
    assert not any("/" in str(value) and Path(str(value)).is_absolute() for value in told.values())
