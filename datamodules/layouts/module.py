"""Training from latents that another code stored, as they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.base import ImageDataModule
from datamodules.cache import AS_USUAL, Making
from datamodules.image_folder import ImageFolder
from datamodules.layouts.latent_files import LatentFiles, LatentRows
from datamodules.layouts.pairing import check_first, check_pairs, converted, info_of
from datamodules.outputs import Outputs
from datamodules.progress import first_rank
from datamodules.source import PictureSource
from datamodules.store import ArrayStore, Verify
from repalign.errors import UserError
from repalign.protocols import Autoencoder, Encoder

LOOKED_AT = 64  # rows whose spread is told


class LatentsAlone:
    """The labels of latent files, as a picture source without pictures.

    Args:
        files: the latents.
        image_size: of the pictures they were made from.
    """

    captions = None
    attribution = None
    has_images = False

    def __init__(self, files: LatentFiles, image_size: int) -> None:
        self.image_size = image_size
        self.labels = files.labels
        self.class_names = files.class_names
        self.fingerprint = files.fingerprint
        self._root = files.root

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """There are no pictures here.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"data.images: pictures are needed, but '{self._root}' holds latents alone; set data.images=FOLDER with "
            "the same pictures, or use reference statistics from a file"
        )


class ForeignLatentDataModule(ImageDataModule):
    """Batches of latents in another code's layout; order, resume and batches are those of our own stores.

    The files do not say which autoencoder made them. Their shape is compared with the composed one, with ``images``
    also the first latent; the rest is for the person to know, and is told in one line.

    Args:
        root: folder or file of the latents.
        layout: makes :class:`datamodules.layouts.latent_files.LatentFiles` from ``root`` and ``num_classes``.
        images: folder of the same pictures in the same (alphabetical) order, for encoders, losses in pixel space and
            metrics; None: latents alone.
        num_classes: number of classes; None: what the labels show.
        convert: write the latents once into a store of ours under ``cache_root`` and read that: memory-mapped, with
            hashes. ``data=latents`` can read it too.
        image_size, batch_size, accumulate, num_workers, seed, horizontal_flip, cache_root, cache_features,
            feature_dtype, keep_images, verify: see :class:`datamodules.base.ImageDataModule`.
    """

    computes = False

    def __init__(
        self,
        *,
        root: str | Path | None,
        layout: Callable[[str | Path | None, int | None], LatentFiles],
        image_size: int,
        batch_size: int,
        images: str | Path | None = None,
        num_classes: int | None = None,
        convert: bool = False,
        accumulate: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        horizontal_flip: bool = False,
        cache_root: str | Path = "cache",
        cache_features: bool = False,
        feature_dtype: str = "float16",
        keep_images: bool = False,
        verify: Verify = "hash",
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            accumulate=accumulate,
            num_workers=num_workers,
            seed=seed,
            horizontal_flip=horizontal_flip,
            cache_root=cache_root,
            cache_features=cache_features,
            feature_dtype=feature_dtype,
            keep_images=keep_images,
            verify=verify,
        )
        self.root = root
        self.layout = layout
        self.pictures_root = images
        self.expected_classes = num_classes
        self.convert = convert

    @cached_property
    def files(self) -> LatentFiles:
        """The latents."""
        return self.layout(self.root, self.expected_classes)

    def make_source(self) -> PictureSource:
        """List the latents, and the pictures beside them."""
        if self.pictures_root is None:
            return LatentsAlone(self.files, self.image_size)
        pictures = ImageFolder(self.pictures_root, self.image_size, upscale=True)
        check_pairs(self.files, pictures)
        return pictures

    def attach_cache(
        self,
        autoencoder: Autoencoder | None = None,
        encoders: Mapping[str, Encoder] | None = None,
        device: torch.device | str = "cpu",
        text_encoders: Mapping[str, Any] | None = None,
        making: Making = AS_USUAL,
    ) -> None:
        """As in :meth:`datamodules.base.ImageDataModule.attach_cache`, after a look at what the files tell.

        Raises:
            UserError: when the latents have another shape than this autoencoder's, or pictures are needed and missing.
        """
        needs = "keep_images" if self.keep_images else "encoders" if encoders else None
        if needs and not self.source.has_images:
            raise UserError(
                f"data.images: {needs} need pictures, and '{self.root}' holds latents alone; set data.images=FOLDER "
                "with the same pictures, or leave out what needs them (encoder=none, data.keep_images=false)"
            )
        if autoencoder is not None:
            self._compare(autoencoder)
        super().attach_cache(autoencoder, encoders, device, text_encoders, making)

    def store_for(  # type: ignore[override]  # rows of files have the reading half of a store's interface
        self, outputs: Outputs, making: Making
    ) -> ArrayStore | LatentRows:
        """The latents as they lie or converted; features are computed from the pictures."""
        if outputs.name != "latents":
            return super().store_for(outputs, making)
        if self.horizontal_flip and not self.files.has_views:
            raise UserError(
                f"data.horizontal_flip: '{self.root}' has no latents of mirrored pictures; set "
                "data.horizontal_flip=false"
            )
        views = 2 if self.horizontal_flip else 1
        rows = LatentRows(self.files, info_of(self.source, outputs.fingerprint, self.files))
        return (
            converted(self.source, rows, outputs.fingerprint, views, self.cache_root, self.verify)
            if self.convert
            else rows
        )

    def _compare(self, autoencoder: Autoencoder) -> None:
        files, source = self.files, self.source
        side = self.image_size // autoencoder.downsampling
        expected = (autoencoder.channels, side, side)
        if files.shape != expected:
            raise UserError(
                f"data.root: latents in '{self.root}' are {_times(files.shape)}, but this autoencoder makes "
                f"{_times(expected)} of data.image_size={self.image_size}; choose the autoencoder and the size that "
                "they were made with"
            )
        known = source.has_images and files.has_std
        if known:
            check_first(files, source, autoencoder)
        if not first_rank():
            return
        rows = [files.moments(row)["moments_mean"] for row in range(min(LOOKED_AT, len(files)))]
        told = "the first picture's latent is this one's" if known else "nothing in it says which autoencoder made it"
        norm = f"latent_norm@autoencoder.norm=file autoencoder.norm.path={files.statistics}"
        beside = f"; their statistics lie beside: {norm}" if files.statistics else ""
        print(
            f"data.root: '{self.root}': {told}; {len(files)} latents {_times(files.shape)}, raw mean "
            f"{np.mean(rows):.3f} and deviation {np.std(rows):.3f} over the first {len(rows)}{beside}",
            flush=True,
        )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
