"""REPA-E at full size on the meta device: the numbers of parameters that the official code has."""

import pytest
import torch

from repalign.state import TokenSpec
from tasks.instantiate import build
from tasks.launch import compose

SD_VAE, F16_VAE = 83_653_863, 69_836_067
DISCRIMINATOR = 2_765_633  # PatchGAN of 64 channels and 3 strided convolutions
# SiT with one projector to 768 channels, positions included (REPA's counts at 32 x 32 x 4).
WITH_PROJECTOR = {"b": 137_845_008, "l": 465_955_600, "xl": 683_242_512}


def count(part):
    return sum(parameter.numel() for parameter in part.parameters())


def parts_of(recipe, monkeypatch):
    monkeypatch.setenv("REPALIGN_IMAGENET", "/data/imagenet")
    cfg = compose([f"experiment={recipe}", "autoencoder.weights=random", "autoencoder.norm=null"])
    with torch.device("meta"):
        autoencoder = build(cfg.autoencoder, "autoencoder")
        side = 256 // autoencoder.downsampling
        shape = (autoencoder.channels, side, side)
        backbone = build(cfg.backbone, "backbone")(latent_shape=shape, num_classes=1000)
        features = {"main": TokenSpec(768, (16, 16))}
        (aligner,) = build(cfg.aligners, "aligners").values()
        aligner = aligner(tap_specs=backbone.tap_specs, features=features)
        discriminator = build(cfg.method.first_stage.adversarial.discriminator, "discriminator")
    return backbone, aligner, autoencoder, discriminator


@pytest.mark.parametrize("size", WITH_PROJECTOR)
def test_sd_vae(size, monkeypatch):
    backbone, aligner, autoencoder, discriminator = parts_of(f"repa_e_sit_{size}", monkeypatch)
    assert count(backbone) + count(aligner) == WITH_PROJECTOR[size]
    assert backbone.pos_embed.requires_grad  # as in the official joint run
    assert count(autoencoder) == SD_VAE and count(discriminator) == DISCRIMINATOR


@pytest.mark.parametrize("name", ["in_vae", "va_vae"])
def test_f16_vae(name, monkeypatch):
    backbone, aligner, autoencoder, _ = parts_of(f"repa_e_sit_xl_{name}", monkeypatch)
    assert count(autoencoder) == F16_VAE
    # SiT-XL/1 on 32 channels: as many tokens; 32 p^2 = 32 inputs and outputs of a patch instead of 4 p^2 = 16.
    assert count(backbone) + count(aligner) == WITH_PROJECTOR["xl"] + (32 - 16) * 2 * 1152 + (32 - 16)
    assert backbone.tap_specs["block.8"].grid == (16, 16)
