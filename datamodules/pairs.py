"""Pairs of pictures of one prompt, of which one is preferred: folders, Pick-a-Pic's Parquet, made-up shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from datamodules.base import ImageDataModule
from datamodules.captioned import listed_file
from datamodules.dataset import SerialDataset
from datamodules.encoded import NO_CLASS, EncodedPictures, existing_root
from datamodules.parquet import ParquetPictures
from datamodules.sampler import SerialBatchSampler
from datamodules.source import PictureSource
from datamodules.synthetic import SHAPES, Shapes
from repalign.errors import UserError
from repalign.random import SampleRandom

LIST = "pairs.jsonl"
FIELDS = ("preferred", "rejected", "prompt")


class PairedSource(PictureSource, Protocol):
    """Pictures, each with its prompt as its caption, and which of two of one prompt is preferred."""

    @property
    def pairs(self) -> np.ndarray:
        """Index of the preferred and of the rejected picture, int64 [P, 2]."""
        ...


class PairDataset(SerialDataset):
    """Gathers P pairs for keys [P, 2] (serial number, number of the pair): P preferred pictures, then their rejected.

    Both of a pair have its serial number, hence the same noise, time, mirroring and dropped conditions.
    """

    source: PairedSource

    def __getitems__(self, keys: np.ndarray) -> dict[str, Any]:
        """A batch of 2 P rows, as the base's."""
        serial, pair = np.asarray(keys).T
        members = self.source.pairs[pair]
        return super().__getitems__(np.stack([np.tile(serial, 2), members.T.reshape(-1)], 1))


class PairDataModule(ImageDataModule):
    """Batches of pairs: ``batch_size`` pairs are 2 ``batch_size`` pictures, the preferred ones first.

    A picture that cannot be read stops the training: in a pair another one cannot take its place.

    Args:
        pictures: makes the source from ``root`` and ``image_size``, the classes of this file.
        root: of the pictures; None for those that are drawn.
        stream: see :class:`datamodules.base.ImageDataModule`; ``batch_size`` counts pairs.

    Raises:
        UserError: as the sources.
    """

    pairs = True

    def __init__(self, *, pictures: Callable[..., Any], root: str | Path | None = None, **stream: Any) -> None:
        super().__init__(**stream)
        self.make_pictures = pictures
        self.root = root

    def make_source(self) -> Any:
        """Open the pictures and their pairs."""
        return self.make_pictures(self.root, self.image_size)

    @cached_property
    def source(self) -> Any:
        """The pictures, their prompts and pairs."""
        return self.make_source()

    @cached_property
    def dataset(self) -> SerialDataset:
        """Batches for keys (serial number, number of a pair)."""
        return PairDataset(self.source, self.seed, self.horizontal_flip)

    def make_sampler(
        self, global_batch: int, rank: int, world: int, accumulate: int, seed: int, start: int
    ) -> Sampler[np.ndarray]:
        """The order of training, over pairs."""
        return SerialBatchSampler(len(self.source.pairs), global_batch, rank, world, accumulate, seed, start)


class PairedFolder(EncodedPictures):
    """A folder of pictures with ``pairs.jsonl``: {"preferred": "a.png", "rejected": "b.png", "prompt": "cat"}.

    File names are relative to the folder. A picture may stand in many pairs; it is stored once for each prompt.

    Args:
        root: the folder.
        image_size: side of the squares that pictures are cut to; smaller ones are enlarged.

    Raises:
        UserError: for a missing or torn list, a line without the three fields, a file that is not there.
    """

    def __init__(self, root: str | Path | None, image_size: int) -> None:
        super().__init__(image_size, on_corrupt="stop", upscale=True)
        self.root = existing_root(root)
        list_of_pairs = self.root / LIST
        if not list_of_pairs.is_file():
            raise UserError(f"data.root: no {LIST} in '{root}'; one object with {', '.join(FIELDS)} a line")
        rows: dict[tuple[str, str], int] = {}
        pairs = []
        for number, line in enumerate(list_of_pairs.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"data.root: '{list_of_pairs}' line {number}"
            *names, prompt = self._fields(line, where)
            pairs.append([rows.setdefault((name, prompt), len(rows)) for name in names])
        if not pairs:
            raise UserError(f"data.root: '{list_of_pairs}' lists no pair")
        self.pairs = np.array(pairs, dtype=np.int64)
        self.files = [name for name, _ in rows]
        self.captions = [prompt for _, prompt in rows]
        self.labels = np.zeros(len(rows), dtype=np.int64)
        self.class_names = NO_CLASS
        digest = hashlib.blake2b(digest_size=8)
        for name, prompt in rows:
            digest.update(f"{name}\0{(self.root / name).stat().st_size}\0{prompt}\n".encode())
        self._fingerprint = f"{self.root.resolve().name}-{image_size}px-{digest.hexdigest()}"

    def _fields(self, line: str, where: str) -> list[str]:
        try:
            held = json.loads(line)
            found = [held[name] for name in FIELDS]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: expected an object with {', '.join(FIELDS)} ({error})") from error
        for name in found[:2]:
            listed_file(name, where)
            if not (self.root / name).is_file():
                raise UserError(f"{where}: no file '{self.root / name}'")
        if not isinstance(found[2], str):
            raise UserError(f"{where}: prompt, expected a text, found {str(found[2])[:40]!r}")
        return found

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of all files and their prompts."""
        return self._fingerprint

    def place(self, index: int) -> str:
        """The path of a picture, quoted."""
        return f"'{self.root / self.files[index]}'"

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return (self.root / self.files[index]).read_bytes()


class PickAPic(EncodedPictures):
    """Parquet files in the layout of Pick-a-Pic (arXiv:2305.01569): two pictures a row, one caption, a label.

    ``label_0`` is 1 where the first picture is preferred and 0 where the second is; rows with another value are ties
    and left out, as Diffusion-DPO does. Pictures 2 r and 2 r + 1 are those of row r.

    Args:
        root: folder of the files.
        image_size: side of the squares that pictures are cut to; smaller ones are enlarged.
        files: which files below ``root``.
        images: the two columns of pictures.
        label: column of the label of the first picture.
        caption: column of the prompts.

    Raises:
        UserError: for missing files or columns, torn files, or when all rows are ties.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        files: str = "**/*.parquet",
        images: Sequence[str] = ("jpg_0", "jpg_1"),
        label: str = "label_0",
        caption: str = "caption",
    ) -> None:
        super().__init__(image_size, on_corrupt="stop", upscale=True)
        self._halves = [ParquetPictures(root, image_size, "stop", True, files, name, None, caption) for name in images]
        first = self._halves[0]
        prompts = first.captions
        assert prompts is not None, "a caption column was named"
        labels = first.numbers(label)
        decided = np.flatnonzero((labels == 0) | (labels == 1))
        if not len(decided):
            raise UserError(f"data.root: no row in '{root}' prefers one of its pictures ({label} is neither 0 nor 1)")
        winner = np.where(labels[decided] == 1, 0, 1)
        self.pairs = np.stack([2 * decided + winner, 2 * decided + 1 - winner], 1).astype(np.int64)
        self.captions = _Twice(prompts)
        self.labels = np.zeros(2 * len(first), dtype=np.int64)
        self.class_names = NO_CLASS
        self._fingerprint = f"{first.fingerprint}-{'-'.join(images)}"

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of the files and the columns."""
        return self._fingerprint

    def place(self, index: int) -> str:
        """File, row group and row in it."""
        return self._halves[index % 2].place(index // 2)

    def read(self, index: int) -> bytes:
        """The bytes of a picture."""
        return self._halves[index % 2].read(index // 2)


class _Twice(Sequence[str]):
    """Every text two times in a row."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return 2 * len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._texts[int(index) // 2]


class PairedShapes(Shapes):
    """Shapes of one kind in pairs, the one nearer to the middle preferred: for tests and first steps.

    Args:
        size: number of pictures; a multiple of twice the number of shapes is used up.
        image_size: side of the pictures.

    Raises:
        UserError: when ``size`` is smaller than twice the number of shapes.
    """

    def __init__(self, size: int, image_size: int) -> None:
        if size < 2 * len(SHAPES):
            raise UserError(f"data.pictures.size: expected {2 * len(SHAPES)} or more, found {size}")
        super().__init__(size, image_size)
        kinds, whole = len(SHAPES), size - size % (2 * len(SHAPES))
        first = np.arange(whole).reshape(-1, 2, kinds)[:, 0].reshape(-1)
        far = self._from_middle(np.arange(whole))
        swap = far[first] > far[first + kinds]
        self.pairs = np.where(swap[:, None], np.stack([first + kinds, first], 1), np.stack([first, first + kinds], 1))

    def _from_middle(self, indices: np.ndarray) -> np.ndarray:
        random = SampleRandom(self.seed, indices.tolist())
        numbers = np.stack([random.uniform(f"shapes/{i}").numpy() for i in range(3)], axis=1)
        places = np.array([self._place(row)[1] for row in numbers])
        return np.hypot(*(places - self.image_size / 2).T)


class SyntheticPairDataModule(PairDataModule):
    """Batches of :class:`PairedShapes`.

    Args:
        size: number of pictures.
        image_size: side of the square pictures.
        stream: see :class:`PairDataModule`.
    """

    def __init__(self, *, image_size: int = 32, size: int = 1024, **stream: Any) -> None:
        super().__init__(pictures=lambda _, side: PairedShapes(size, side), image_size=image_size, **stream)
