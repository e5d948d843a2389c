"""The data module that every set of pictures shares."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datamodules.cache import AS_USUAL, STALLED_AFTER, CachedOutputs, Making, as_float, whole_batch
from datamodules.curated import kept_of
from datamodules.dataset import SerialDataset, SerialLoader, split_moments
from datamodules.outputs import Outputs, outputs_of, placed
from datamodules.sampler import SerialBatchSampler
from datamodules.source import PictureSource
from datamodules.store import ArrayStore, Verify
from repalign.errors import UserError, unknown_choice
from repalign.protocols import Autoencoder, Encoder

VERIFY = ("hash", "size")
STORED_DTYPES = ("float16", "float32")
StoredDtype = Literal["float16", "float32"]


class ImageDataModule(pl.LightningDataModule, ABC):
    """An endless, counted stream of training batches, and all pictures for metrics.

    The sample with serial number s = step * batch_size + position is the same for every number of ranks, workers and
    micro-batches, so a run that resumes with :meth:`set_start` repeats the uninterrupted one.

    Args:
        image_size: side of the square pictures.
        batch_size: samples of one optimizer step over all ranks and micro-batches.
        accumulate: micro-batches per optimizer step.
        num_workers: reading processes; for batches that lie in stores alone, one thread reads twice so many ahead.
        seed: of order and mirroring.
        horizontal_flip: mirror pictures at random; caches then hold both views.
        cache_root: folder of the stores that the project makes.
        cache_latents: read latents from a store instead of running the autoencoder; off when it is being trained.
        cache_features: read encoder features from a store instead of running the encoders.
        latent_dtype: of stored latents, 'float32' (training from them is training from the pictures) or 'float16' (half
            the disk; rounds by 2^-11 of a value).
        feature_dtype: of stored features, 'float16' or 'float32'.
        keep_images: batches carry pictures even when everything is cached (for losses in pixel space).
        verify: check stores once per run by 'hash', or by 'size' alone.
        keep: folder that ``task=curate`` wrote: the pictures that it removed are not there; None for all.

    Raises:
        UserError: for a value out of range.
    """

    def __init__(
        self,
        *,
        image_size: int,
        batch_size: int,
        accumulate: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        horizontal_flip: bool = False,
        cache_root: str | Path = "cache",
        cache_latents: bool = True,
        cache_features: bool = True,
        latent_dtype: StoredDtype = "float32",
        feature_dtype: StoredDtype = "float16",
        keep_images: bool = False,
        verify: Verify = "hash",
        keep: str | Path | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("accumulate", accumulate, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{key}: expected {least} or more, found {value}")
        if verify not in VERIFY:
            raise unknown_choice("data.verify", verify, VERIFY)
        for key, dtype in (("latent_dtype", latent_dtype), ("feature_dtype", feature_dtype)):
            if dtype not in STORED_DTYPES:
                raise unknown_choice(f"data.{key}", dtype, STORED_DTYPES)
        self.image_size = image_size
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.cache_root = Path(cache_root).expanduser()
        self.cache_latents = cache_latents
        self.cache_features = cache_features
        self.latent_dtype = latent_dtype
        self.feature_dtype = feature_dtype
        self.keep_images = keep_images
        self.verify: Verify = verify
        self.keep = keep
        self.start = 0
        self.stores: dict[str, ArrayStore] = {}

    sizes = False  # whether batches carry the sizes of pictures
    computes = True  # whether stores that are missing can be made; not where they are what the data set consists of

    @abstractmethod
    def make_source(self) -> PictureSource:
        """Open or make the pictures; called once, when they are first needed."""

    @cached_property
    def source(self) -> PictureSource:
        """The pictures, without those that a curation removed."""
        return kept_of(self.make_source(), self.keep)

    @cached_property
    def dataset(self) -> SerialDataset:
        """Batches for keys (serial number, index); ``len(data.dataset)`` is the number of pictures."""
        return SerialDataset(self.source, self.seed, self.horizontal_flip)

    @property
    def class_names(self) -> Sequence[str]:
        """One name per label."""
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.source.class_names)

    @property
    def captions(self) -> Sequence[str] | None:
        """One text per picture, or None."""
        return self.source.captions

    @property
    def fingerprint(self) -> str:
        """Stands for pictures, order and size."""
        return self.source.fingerprint

    @property
    def attribution(self) -> str | None:
        """The licence line that must go with the pictures, or None."""
        return self.source.attribution

    def setup(self, stage: str | None = None) -> None:
        """Open the pictures now rather than at the first batch."""
        len(self.dataset)

    def set_start(self, step: int) -> None:
        """Let the stream begin at this optimizer step."""
        self.start = step

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The stream of this rank; it has no length and no end."""
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        sampler = self.make_sampler(self.batch_size, rank, world, self.accumulate, self.seed, self.start)
        # Lightning advises workers; for memory-mapped stores they cost more than they bring.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return SerialLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            pin_memory=torch.cuda.is_available(),
            timeout=STALLED_AFTER if self.num_workers else 0,
            # The loader draws a seed for its workers: from here, so that the global generator stays as it was.
            generator=torch.Generator(),
        )

    def make_sampler(
        self, global_batch: int, rank: int, world: int, accumulate: int, seed: int, start: int
    ) -> Sampler[np.ndarray]:
        """The order of training."""
        return SerialBatchSampler(len(self.dataset), global_batch, rank, world, accumulate, seed, start)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Serial numbers stay on the host: reading them back would stall the device at every step."""
        rest = {name: value for name, value in batch.items() if name != "serial"}
        moved = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {**split_moments(moved), "serial": batch["serial"]}

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b 3 h w"]:
        """Pictures by index, never mirrored."""
        return torch.from_numpy(self.source.load(list(indices))[0])

    def reference_images(self, batch_size: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """All pictures in order, in [0, 1]: what generated ones are compared with."""
        for first in range(0, len(self.source), batch_size):
            indices = range(first, min(first + batch_size, len(self.source)))
            yield as_float(self.source.load(list(indices))[0])

    def attach_cache(
        self,
        autoencoder: Autoencoder | None = None,
        encoders: Mapping[str, Encoder] | None = None,
        device: torch.device | str = "cpu",
        text_encoders: Mapping[str, Any] | None = None,
        making: Making = AS_USUAL,
    ) -> None:
        """Make batches carry what frozen networks say of the pictures, computing it first where it is not stored.

        Latents come as ``moments_mean`` and ``moments_std``, features as ``features/<name>`` [B, prefix + N, D], text
        as ``text/<name>`` [B, N, D], ``text_mask/<name>`` [B, N] and ``text_pooled/<name>`` [B, P], each in the type it
        is stored in. What the options ``cache_latents`` and ``cache_features`` exclude stays to be computed by the
        module; pictures are left out of the batches when nobody needs them.

        Args:
            autoencoder: whose ``encode`` gives the moments; None when latents are not wanted.
            encoders: by name.
            device: where the networks run for this; they return to where they were.
            text_encoders: by name; captions -> ``data``, ``mask`` and ``pooled`` (or None).
            making: how stores that are not there are made.

        Raises:
            UserError: when a network has no ``fingerprint``, or gives values that cannot be stored.
        """
        wanted = self.outputs(autoencoder, encoders or {}, text_encoders or {}, device)
        self.stores = {}
        for outputs in wanted:
            with placed(outputs.network, device):
                self.stores[outputs.name] = self.store_for(outputs, making)
        texts = {outputs.name for outputs in wanted if outputs.of_captions}
        self.dataset.stores = tuple(store for name, store in self.stores.items() if name not in texts)
        self.dataset.text_stores = tuple(self.stores[name] for name in texts)
        # Without an autoencoder here, somebody else turns the pictures into latents (or trains the one that does).
        networks = {"latents", *(f"features_{name}" for name in encoders or {})}
        self.dataset.with_images = self.keep_images or not networks <= self.stores.keys()
        if self.dataset.with_images and not self.source.has_images:
            raise UserError(
                f"data: {self.source.fingerprint} has no pictures, only {', '.join(sorted(self.stores)) or 'labels'}; "
                "set data.cache_latents=true, data.cache_features=true, data.keep_images=false"
            )

    @property
    def views(self) -> int:
        """How often a picture is stored: mirrored too, or once."""
        return 2 if self.horizontal_flip else 1

    def outputs(
        self,
        autoencoder: Autoencoder | None,
        encoders: Mapping[str, Encoder],
        text_encoders: Mapping[str, Any],
        device: torch.device | str,
    ) -> list[Outputs]:
        """What is to be read from stores, by the options ``cache_latents`` and ``cache_features``."""
        return outputs_of(
            autoencoder if self.cache_latents else None,
            encoders if self.cache_features else {},
            text_encoders if self.cache_features else {},
            device,
            self.latent_dtype,
            self.feature_dtype,
        )

    def cached(self, outputs: Outputs, making: Making) -> Sequence[CachedOutputs]:
        """The stores of a network's outputs, not yet opened: one, or one for each shape of the pictures."""
        return [CachedOutputs(self.source, outputs, self.cache_root, self.views, making, self.verify)]

    def store_for(self, outputs: Outputs, making: Making) -> ArrayStore:
        """The store of a network's outputs over all pictures, made when it is not there."""
        (only,) = self.cached(outputs, making)
        return only.store()
