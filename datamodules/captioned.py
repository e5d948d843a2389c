"""Sets of pictures with captions: tar shards as img2dataset writes them, Parquet, a folder with metadata.jsonl."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.captions import FirstCaptions, Sets, texts_in
from datamodules.encoded import NO_CLASS, EncodedPictures, existing_root
from datamodules.packages import need
from datamodules.parquet import ParquetPictures, opened
from datamodules.tar_index import read_at
from datamodules.webdataset import TarPictures
from repalign.errors import UserError, unknown_choice

METADATA = "metadata.jsonl"


class CaptionedTars(TarPictures):
    """:class:`datamodules.webdataset.TarPictures` with all captions of a sample: CC12M by img2dataset.

    Original captions are those of ``KEY.txt``, or of the field 'caption' in ``KEY.json``; synthetic ones those of
    another field there. A field holds a text or a list of texts.

    Args:
        root, image_size, on_corrupt, upscale, cache_root, files: see the base.
        synthetic: field of the synthetic captions; None for none.

    Raises:
        UserError: as the base, and when the shards have no captions.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        cache_root: str | Path = "cache",
        files: str = "**/*.tar",
        synthetic: str | None = None,
    ) -> None:
        super().__init__(root, image_size, on_corrupt, upscale, cache_root, files)
        if self.captions is None:
            raise UserError(f"data.root: the shards in '{root}' have no captions (.txt, or 'caption' in .json)")
        self._first = self.captions
        self.synthetic = synthetic
        self.caption_options = f"tars {synthetic}"

    def caption_sets(self, index: int) -> Sets:
        """Original and synthetic captions of a picture."""
        original = [self._first[index]]
        if self.synthetic is None:
            return original, []
        offset, size = self._index.json[index].tolist()
        if size < 0:
            return original, []
        held = json.loads(read_at(self.shards[self._index.shard[index]], offset, size))
        return original, texts_in(held.get(self.synthetic), f"data.pictures.synthetic: {self.place(index)}")


class CaptionedParquet(ParquetPictures):
    """:class:`datamodules.parquet.ParquetPictures` with all captions of a row; there are no classes.

    Args:
        root, image_size, on_corrupt, upscale, files, image: see the base.
        cache_root: not used: Parquet files have an index of their own.
        original: column of the original captions, texts or lists of texts.
        synthetic: column of the synthetic ones; None for none.

    Raises:
        UserError: as the base, and for a missing column.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        cache_root: str | Path = "cache",
        files: str = "**/*.parquet",
        image: str = "image",
        original: str = "caption",
        synthetic: str | None = None,
    ) -> None:
        super().__init__(root, image_size, on_corrupt, upscale, files, image, label=None)
        self.caption_options = f"parquet {original} {synthetic}"
        named = {"original": original, "synthetic": synthetic}
        self._texts = {kind: None if name is None else self._column_of(kind, name) for kind, name in named.items()}
        self.captions = FirstCaptions(self)

    def caption_sets(self, index: int) -> Sets:
        """Original and synthetic captions of a picture."""
        found = []
        for kind, column in self._texts.items():
            value = None if column is None else column[index].as_py()
            found.append(texts_in(value, f"data.pictures.{kind}: {self.place(index)}"))
        if not any(found):
            raise UserError(f"data.pictures.original: {self.place(index)} has no caption")
        return found[0], found[1]

    def _column_of(self, kind: str, name: str) -> Any:
        parts = []
        for path in self.shards:
            file = opened(path)
            if name not in file.schema_arrow.names:
                raise unknown_choice(f"data.pictures.{kind}", name, file.schema_arrow.names, f"column of '{path}'")
            parts += file.read(columns=[name]).column(name).chunks
        return need("pyarrow", "data=parquet", "data").chunked_array(parts)


class CaptionedFolder(EncodedPictures):
    """Pictures in a folder, listed with their captions in ``metadata.jsonl`` (the library ``datasets``' imagefolder).

    Every line is an object with 'file_name', relative to the folder, and the captions in fields of one's choice.

    Args:
        root: the folder.
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        cache_root: not used: the list is read whole.
        original: field of the original captions, a text or a list of texts.
        synthetic: field of the synthetic ones; None for none.

    Raises:
        UserError: for a missing or torn list, a line without a file or caption, a file outside the folder.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        cache_root: str | Path = "cache",
        original: str = "text",
        synthetic: str | None = None,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        self.root = existing_root(root)
        self.files: list[str] = []
        self._sets: list[Sets] = []
        listed = self.root / METADATA
        if not listed.is_file():
            raise UserError(f"data.root: no {METADATA} in '{root}'")
        digest = hashlib.blake2b(digest_size=8)
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"data.root: '{listed}' line {number}"
            name, held = _listed(line, where)
            sets = tuple(texts_in(held.get(key), where) if key else [] for key in (original, synthetic))
            if not any(sets):
                raise UserError(f"{where}: no caption in '{original}'; it has {', '.join(held)}")
            if not (self.root / name).is_file():
                raise UserError(f"{where}: no file '{self.root / name}'")
            digest.update(f"{name}\0{(self.root / name).stat().st_size}\n".encode())
            self.files.append(name)
            self._sets.append((sets[0], sets[1]))
        if not self.files:
            raise UserError(f"data.root: '{listed}' lists no picture")
        self.labels = np.zeros(len(self.files), dtype=np.int64)
        self.class_names = NO_CLASS
        self.captions = FirstCaptions(self)
        texts = hashlib.blake2b(repr(self._sets).encode(), digest_size=8).hexdigest()
        self.caption_options = f"folder {original} {synthetic} {texts}"
        self._fingerprint = f"{self.root.resolve().name}-{image_size}px-{digest.hexdigest()}"

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of all files."""
        return self._fingerprint

    def place(self, index: int) -> str:
        """The path of a picture, quoted."""
        return f"'{self.root / self.files[index]}'"

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return (self.root / self.files[index]).read_bytes()

    def caption_sets(self, index: int) -> Sets:
        """Original and synthetic captions of a picture."""
        return self._sets[index]


def _listed(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        held = json.loads(line)
        name = held["file_name"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: expected an object with 'file_name' ({error})") from error
    return listed_file(name, where), held


def listed_file(name: object, where: str) -> str:
    """A file name of a list, which may not lead out of its folder.

    Raises:
        UserError: for anything else, naming ``where``.
    """
    if not isinstance(name, str) or len(name) > 1024 or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: file_name '{str(name)[:80]}', expected a file below the folder")
    return name
