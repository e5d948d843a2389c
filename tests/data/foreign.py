"""Latents written as other codes write them, in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from datamodules.image_folder import ImageFolder
from datamodules.layouts.ddt import DDTLatents
from datamodules.layouts.latent_files import LatentFiles
from datamodules.layouts.lightningdit import LightningDiTLatents
from datamodules.layouts.repa import REPALatents
from datamodules.layouts.repa_e import REPAELatents
from repalign.state import Gaussian

Encode = Callable[[torch.Tensor], Gaussian]


def moments_of(images: ImageFolder, encode: Encode, flip: bool = False) -> Gaussian:
    pixels = torch.from_numpy(images.load(range(len(images)))[0]).float() / 255
    return encode(pixels.flip(-1) if flip else pixels)


def write_repa(root: Path, images: ImageFolder, encode: Encode) -> Path:
    """00000/img-mean-std-00000000.npy: float32 [2C, h, w]; dataset.json, not in order."""
    moments = moments_of(images, encode)
    labels = []
    for i in range(len(images)):
        name = f"{i // 5:05d}/img-mean-std-{i:08d}.npy"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / name, torch.cat([moments.mean[i], moments.std[i]]).numpy())
        labels.append([name, int(images.labels[i])])
    (root / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return root


def write_repa_e(root: Path, images: ImageFolder, encode: Encode) -> Path:
    """One HDF5 file with a group per thousand and dataset.json as a byte string; the list of keys and statistics."""
    moments = moments_of(images, encode)
    root.mkdir(parents=True)
    labels = []
    with h5py.File(root / "repae-invae-400k.h5", "w") as file:
        for i in range(len(images)):
            name = f"{i // 5:05d}/img-mean-std-{i:08d}.npy"
            file.create_dataset(name, data=torch.cat([moments.mean[i], moments.std[i]]).numpy())
            labels.append([name, int(images.labels[i])])
        file.create_dataset("dataset.json", data=np.array(json.dumps({"labels": labels}).encode(), dtype="S"))
    (root / "repae-invae-400k_h5.json").write_text(json.dumps([name for name, _ in labels] + ["dataset.json"]))
    return root / "repae-invae-400k.h5"


def write_lightningdit(root: Path, images: ImageFolder, encode: Encode) -> Path:
    """Shards of five samples with both views, and statistics."""
    root.mkdir(parents=True)
    views = [moments_of(images, encode, flip).mean for flip in (False, True)]
    labels = torch.from_numpy(images.labels)
    for shard, first in enumerate(range(0, len(images), 5)):
        rows = slice(first, first + 5)
        tensors = {"latents": views[0][rows], "latents_flip": views[1][rows], "labels": labels[rows]}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"total_size": str(len(tensors["labels"])), "dtype": "torch.float32", "device": "cpu"}
        save_file(tensors, root / f"latents_rank00_shard{shard:03d}.safetensors", metadata)
    mean, std = (f(views[0], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    torch.save({"mean": mean, "std": std}, root / "latents_stats.pt")
    return root


def write_ddt(root: Path, images: ImageFolder, encode: Encode) -> Path:
    """PICTURE.JPEG.pt in the tree of the pictures: mean and logvar."""
    moments = moments_of(images, encode)
    for i, name in enumerate(images.files):
        path = root / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"mean": moments.mean[i].clone(), "logvar": 2 * moments.std[i].log()}, path)
    return root


Write = Callable[[Path, ImageFolder, Encode], Path]
LAYOUTS: dict[str, tuple[Write, type[LatentFiles]]] = {
    "repa": (write_repa, REPALatents),
    "repa_e": (write_repa_e, REPAELatents),
    "lightningdit": (write_lightningdit, LightningDiTLatents),
    "ddt": (write_ddt, DDTLatents),
}
