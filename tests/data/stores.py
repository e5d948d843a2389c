"""Small stores of latents, and ways to damage them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from datamodules.base import ImageDataModule
from datamodules.latents import LatentDataModule
from datamodules.synthetic import SyntheticDataModule

N = 20


def shapes(tmp_path: Path, **options: object) -> SyntheticDataModule:
    common = {"batch_size": 5, "image_size": 16, "size": N, "cache_root": tmp_path / "cache", "seed": 1}
    return SyntheticDataModule(**{**common, **options})


def latents(tmp_path: Path, **options: object) -> LatentDataModule:
    root = next((tmp_path / "cache").iterdir())
    return LatentDataModule(**{"root": root, "image_size": 16, "batch_size": 5, "seed": 1, **options})


def batches(data: ImageDataModule, number: int = 12) -> list[dict[str, torch.Tensor]]:
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(number)]


def hurt(folder: Path, damage: str) -> None:
    path = folder / "moments_mean.00002.npy"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 10)
    elif damage == "remove":
        path.unlink()
    else:
        other, spare = folder / "moments_mean.00003.npy", folder / "spare"
        path.rename(spare)
        other.rename(path)
        spare.rename(other)
