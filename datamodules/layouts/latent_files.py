"""What every layout of stored latents offers, and its face as a store."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.encoded import check_classes, labels_of
from datamodules.store import DamagedStore
from repalign.errors import UserError

Row = tuple[np.ndarray, np.ndarray | None]  # mean and standard deviation [C, h, w]; None: the latent is a sample


class LatentFiles(ABC):
    """Raw latents and labels of N pictures, in a fixed order, with nothing said about the autoencoder.

    A subclass finds its files and sets ``labels`` and ``class_names``; :meth:`look` then learns the shape from the
    first row. Files are opened by the process that reads them.

    Args:
        root: folder or file of the latents.
        num_classes: number of classes where labels are bare numbers; None: the largest label + 1.
        key: the configuration key that names ``root``, for messages.

    Attributes:
        shape: (C, h, w) of a latent.
        has_std: whether the standard deviation of the posterior is stored; otherwise latents are samples of it.
        has_views: whether mirrored pictures are stored too, as rows N to 2 N - 1.
        statistics: a file of latent statistics that lies beside them, or None.
    """

    labels: np.ndarray
    class_names: Sequence[str]
    shape: tuple[int, int, int]
    has_std: bool
    has_views = False
    statistics: Path | None = None

    def __init__(self, root: str | Path | None, num_classes: int | None = None, key: str = "data.root") -> None:
        if root is None:
            raise UserError(f"{key}: has no value; set {key}=PATH or the environment variable REPALIGN_LATENTS")
        self.root = Path(root).expanduser()
        self.num_classes = num_classes
        self.key = key
        if not self.root.exists():
            raise UserError(f"{key}: no file or folder '{root}'")

    @abstractmethod
    def place(self, row: int) -> str:
        """Where a row lies, for messages."""

    @abstractmethod
    def read(self, row: int) -> Row:
        """The moments of a row as they are stored, any floating type.

        Raises:
            UserError: when it cannot be read.
        """

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Name, and a hash over labels, shape and the first row: stands for the latents in the names of caches."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=8)
        digest.update(f"{self.shape}{self.has_views}".encode() + self.moments(0)["moments_mean"].tobytes())
        return f"{self.root.resolve().stem}-latents-{digest.hexdigest()}"

    def look(self) -> None:
        """Learn the shape from the first row."""
        mean, std = self.read(0)
        if mean.ndim != 3:
            raise UserError(f"{self.key}: {self.place(0)} has shape {mean.shape}, expected [C, h, w]")
        channels, height, width = mean.shape
        self.shape = (channels, height, width)
        self.has_std = std is not None

    def moments(self, row: int) -> dict[str, np.ndarray]:
        """``moments_mean`` and, if stored, ``moments_std`` of a row, float32 [C, h, w].

        Raises:
            DamagedStore: when its shape differs from the first row's, or a value is not finite.
        """
        mean, std = self.read(row)
        found = {"moments_mean": mean} if std is None else {"moments_mean": mean, "moments_std": std}
        for value in found.values():
            if value.shape != self.shape:
                raise DamagedStore(f"{self.key}: {self.place(row)} has shape {value.shape}, the first row {self.shape}")
            if not np.isfinite(value).all():
                raise DamagedStore(f"{self.key}: {self.place(row)} has values that are not finite")
        return {name: value.astype(np.float32, copy=False) for name, value in found.items()}

    def number_classes(self, labels: Sequence[int] | np.ndarray) -> None:
        """Take bare numbers as labels; classes are called by their numbers.

        Raises:
            UserError: for a negative label, or one that ``num_classes`` has no room for.
        """
        self.labels = labels_of(labels, f"{self.key}: '{self.root}'", self.num_classes)
        self.class_names = [str(label) for label in range(self.num_classes or int(self.labels.max()) + 1)]

    def name_classes(self, labels: Sequence[int], names: Sequence[str]) -> None:
        """Take labels and the names of their classes.

        Raises:
            UserError: when ``num_classes`` is another number.
        """
        check_classes(len(names), self.num_classes, self.root)
        self.labels, self.class_names = np.array(labels, dtype=np.int64), names


class LatentRows:
    """Latent files with the face of :class:`datamodules.store.ArrayStore`: rows are gathered by name.

    Args:
        files: the latents.
        info: what is known of them, as in a store's manifest.
    """

    mapped = False  # it keeps what it read last, for one reader at a time

    def __init__(self, files: LatentFiles, info: Mapping[str, Any]) -> None:
        self.files = files
        self.folder = files.root
        self.info = dict(info)
        names = ["moments_mean", "moments_std"] if files.has_std else ["moments_mean"]
        self.arrays: Collection[str] = (*names, "index", "label")
        self._last: tuple[bytes, dict[str, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.files) * (2 if self.files.has_views else 1)

    def gather(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copies of the rows [B, *row shape], in the order asked."""
        wanted = np.asarray(rows, dtype=np.int64)
        if name == "index":
            return wanted % len(self.files)
        if name == "label":
            return self.files.labels[wanted % len(self.files)]
        # Mean and standard deviation are asked for one after the other and lie in the same place: read once.
        if self._last is None or self._last[0] != wanted.tobytes():
            parts = [self.files.moments(row) for row in wanted.tolist()]
            self._last = wanted.tobytes(), {key: np.stack([part[key] for part in parts]) for key in parts[0]}
        return self._last[1][name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def labels_from_json(content: bytes, key: str, place: str) -> dict[str, int]:
    """File name -> label, from the object {"labels": [["00000/a.npy", 3], ...]} of EDM's and REPA's preparation.

    Raises:
        UserError: when it is another object, or has no labels.
    """
    try:
        pairs = json.loads(content)["labels"]
        labels = {str(name).replace("\\", "/"): int(label) for name, label in pairs or ()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{key}: {place} is not of the form {{"labels": [["00000/a.npy", 0], ...]}} ({error})'
        ) from error
    if not labels:
        raise UserError(f"{key}: {place} has no labels (null or empty); prepare the pictures with their labels")
    return labels
