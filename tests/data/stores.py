"""Small stores of latents, and ways to damage them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from datamodules.base import ImageDataModule
from datamodules.cache import Making
from datamodules.latents import LatentDataModule
from datamodules.synthetic import SyntheticDataModule

N = 20
SMALL = Making(shard_mib=3 * 4 * 96 / 2**20)  # three rows of latents a shard, so that there are many


def shapes(tmp_path: Path, **options: object) -> SyntheticDataModule:
    common = {"batch_size": 5, "image_size": 16, "size": N, "cache_root": tmp_path / "cache", "seed": 1}
    return SyntheticDataModule(**{**common, **options})


def latents(tmp_path: Path, **options: object) -> LatentDataModule:
    root = next((tmp_path / "cache").iterdir())
    return LatentDataModule(**{"root": root, "image_size": 16, "batch_size": 5, "seed": 1, **options})


def batches(data: ImageDataModule, number: int = 12) -> list[dict[str, torch.Tensor]]:
    """What the device gets."""
    loader = iter(data.train_dataloader())
    return [data.transfer_batch_to_device(next(loader), torch.device("cpu"), 0) for _ in range(number)]


def same(one: dict[str, object], two: dict[str, object]) -> bool:
    """Whether two batches hold the same."""
    assert one.keys() == two.keys()
    return all(torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k] for k in one)


def hurt(folder: Path, damage: str, array: str = "moments") -> None:
    path = folder / f"{array}.00002.npy"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 10)
    elif damage == "remove":
        path.unlink()
    else:
        other, spare = folder / f"{array}.00003.npy", folder / "spare"
        path.rename(spare)
        other.rename(path)
        spare.rename(other)
