"""task=probe: how alike the hidden states of a trained backbone and an encoder's features are, tap by tap."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from datamodules.base import ImageDataModule
from datamodules.cache import whole_batch
from datamodules.dataset import SerialLoader
from datamodules.progress import progress
from repalign.errors import UserError, unknown_choice
from repalign.protocols import Encoder
from repalign.training.probe import alignment_of_taps
from tasks.instantiate import build
from tasks.sample import device, restored


def run(cfg: DictConfig) -> None:
    """Measure and write ``probe.csv`` (tap, cknna).

    Raises:
        UserError: one line for a missing checkpoint, an unknown tap or encoder, or too few pictures.
    """
    values = probe(cfg)
    target = Path(cfg.task.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w", newline="") as file:
        csv.writer(file).writerows([("tap", "cknna"), *((tap, f"{value:.6f}") for tap, value in values.items())])
    best = max(values, key=lambda tap: values[tap])
    print(f"wrote {target}: {len(values)} taps, CKNNA with '{cfg.task.encoder}' up to {values[best]:.3f} at {best}")


def probe(cfg: DictConfig) -> dict[str, float]:
    """CKNNA of every wanted tap with the encoder; see :func:`repalign.training.probe.alignment_of_taps`.

    Raises:
        UserError: one line for a missing checkpoint, an unknown tap or encoder, or too few pictures.
    """
    task = cfg.task
    if task.encoder not in cfg.encoders:
        raise unknown_choice("task.encoder", task.encoder, cfg.encoders, "encoder; choose one by encoder=...")
    if task.pictures < 1:
        raise UserError(f"task.pictures: expected 1 or more, found {task.pictures}")
    assembly, generator, _ = restored(cfg)
    taps = list(generator.backbone.tap_specs if task.taps is None else task.taps)
    for tap in taps:
        if tap not in generator.backbone.tap_specs:
            raise unknown_choice("task.taps", tap, generator.backbone.tap_specs, "tap of this backbone")
    # A recipe without aligners builds no encoder; here one is compared with.
    encoders: Mapping[str, Encoder] = assembly.encoders or build(cfg.encoders, "encoders")
    for encoder in encoders.values():
        if isinstance(encoder, torch.nn.Module):
            encoder.to(device())
    data: ImageDataModule = assembly.data
    data.setup("fit")
    data.attach_cache(autoencoder=assembly.autoencoder, encoders=encoders, device=device())
    return alignment_of_taps(
        taps,
        task.encoder,
        batches(data, task.pictures, task.batch_size, task.seed),
        backbone=generator.backbone,
        path=generator.path,
        conditioner=generator.conditioner,
        autoencoder=assembly.autoencoder,
        encoders=encoders,
        streams=assembly.module.streams,
        t=task.t,
        neighbors=task.neighbors,
        seed=task.seed,
    )


def batches(data: ImageDataModule, pictures: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of pictures that are drawn at random, without repetition; a picture's index is its serial number."""
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(data.dataset))[:pictures]
    keys = [np.stack([part, part], axis=1) for part in np.split(chosen, range(size, len(chosen), size))]
    loader = SerialLoader(data.dataset, batch_sampler=keys, collate_fn=whole_batch, generator=torch.Generator())
    with progress("probing", len(chosen)) as advance:
        for batch in loader:
            yield data.transfer_batch_to_device(batch, device(), 0)
            advance(len(batch["label"]))
