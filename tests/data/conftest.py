"""Small pictures and made-up networks that the tests of the data share."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch
from torch import nn

from datamodules.image_folder import ImageFolder
from datamodules.openmoji import OpenMoji
from repalign.state import Gaussian, Tokens, TokenSpec

torch.set_num_threads(1)


class TinyAutoencoder:
    """Moments that depend on every pixel and on left and right."""

    downsampling = 4
    channels = 3
    fingerprint = "tiny autoencoder 1"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, images: torch.Tensor) -> Gaussian:
        self.calls += len(images)
        mean = nn.functional.avg_pool2d(images, 4) * torch.linspace(1, 2, images.shape[-1] // 4)
        return Gaussian(mean, 0.1 + mean.square())


class TinyEncoder:
    """A class token and the pooled grid."""

    spec = TokenSpec(3, (2, 2), 1)
    fingerprint = "tiny encoder/1"

    def __call__(self, images: torch.Tensor) -> Tokens:
        grid = nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).mT
        return Tokens(torch.cat([grid.mean(1, keepdim=True), grid], 1), (2, 2), 1)


@pytest.fixture(scope="session")
def openmoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the rendered pictures, one for all worker processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    OpenMoji(32, shared / "openmoji_cache")
    return shared / "openmoji_cache"


@pytest.fixture(scope="session")
def pictures(openmoji_cache: Path) -> OpenMoji:
    return OpenMoji(32, openmoji_cache, ["Activities", "Flags", "Smileys & Emotion"])


@pytest.fixture
def folder(tmp_path: Path, pictures: OpenMoji) -> Path:
    """ImageNet in miniature: three classes of four JPEG and PNG files, 40 x 32 pixels."""
    root = tmp_path / "imagenet"
    for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
        (root / name).mkdir(parents=True)
        chosen = [int(i) for i in (pictures.labels == label).nonzero()[0][:4]]
        for number, pixels in enumerate(pictures.load(chosen)[0]):
            picture = PIL.Image.new("RGB", (40, 32), "white")
            picture.paste(PIL.Image.fromarray(pixels.transpose(1, 2, 0)), (4, 0))
            picture.save(root / name / f"{name}_{number}.{'JPEG' if number % 2 else 'png'}")
    return root


@pytest.fixture
def images(folder: Path) -> ImageFolder:
    return ImageFolder(folder, 32)
