"""Pictures in Parquet files, as the Hugging Face hub stores data sets."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.encoded import (
    NO_CLASS,
    EncodedPictures,
    check_classes,
    digest_of,
    existing_root,
    labels_of,
    shards_in,
)
from datamodules.packages import need
from repalign.errors import UserError, unknown_choice

ROW_GROUPS_KEPT = 4  # per process: a row group is the least that Parquet can read


class ParquetPictures(EncodedPictures):
    """Encoded pictures in a column of Parquet files, in the order of file names and rows.

    The column holds the bytes, or a struct {bytes, path} as the library ``datasets`` writes it. Class names come from
    the schema (``ClassLabel`` in the metadata 'huggingface'); without them, or without a label column, see below.

    Reading in order is fast. A picture at random costs its whole row group (about 100 pictures): store latents by
    task=precompute before training.

    Args:
        root: folder of the files.
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        files: which files below ``root``, such as 'data/train-*.parquet'.
        image: column of the pictures.
        label: column of the labels, integers; None: label 0 for all, one class.
        caption: column of the texts; None for none.
        num_classes: when given, the number of classes that must be found.

    Raises:
        UserError: for missing files or columns, torn files, columns of another type, negative labels.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        files: str = "**/*.parquet",
        image: str = "image",
        label: str | None = "label",
        caption: str | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        pa = need("pyarrow", "data=parquet", "data")
        self.root = existing_root(root)
        self.shards = shards_in(self.root, files)
        self._column = image
        self._handles: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._process = os.getpid()
        groups = []  # (file, row group, rows)
        labels, captions = [], []
        names: Sequence[str] | None = None
        for shard, path in enumerate(self.shards):
            file = opened(path)
            _check_columns(path, file.schema_arrow, {"image": image, "label": label, "caption": caption})
            metadata = file.metadata
            groups += [(shard, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
            if label is not None:
                column = file.read(columns=[label]).column(label)
                if column.null_count:
                    raise UserError(f"data.label: '{path}' has rows without a label in column '{label}'")
                labels.append(column.to_numpy())
                names = names or _class_names(file.schema_arrow, label)
            if caption is not None:
                captions.append(file.read(columns=[caption]).column(caption).cast(pa.large_string()))
        self._place = np.array([group[:2] for group in groups], dtype=np.int64).reshape(-1, 2)
        self._ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)
        rows = int(self._ends[-1]) if len(groups) else 0
        if not rows:
            raise UserError(f"data.root: the {len(self.shards)} files in '{root}' have no rows")
        self.labels = np.zeros(rows, dtype=np.int64)
        self.class_names = NO_CLASS
        if label is not None:
            where = f"data.label: column '{label}' in '{root}'"
            self.labels = labels_of(np.concatenate(labels), where, len(names) if names else None)
            self.class_names = names or [str(number) for number in range(int(self.labels.max()) + 1)]
        check_classes(len(self.class_names), num_classes, root)
        self.captions = None if caption is None else Texts(pa.chunked_array(captions))
        self._fingerprint = digest_of(self.root, self.shards, image_size, image, label, caption)

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of the files and the columns."""
        return self._fingerprint

    def place(self, index: int) -> str:
        """File, row group and row in it."""
        shard, group, row = self._locate(index)
        return f"'{self.shards[shard]}' (row group {group}, row {row})"

    def read(self, index: int) -> bytes:
        """The bytes of a picture; its row group is read and kept for the next ones."""
        shard, group, row = self._locate(index)
        value = self._group(shard, group)[row].as_py()
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content is None:
            raise OSError("the row has no bytes, only a path or nothing")
        return content

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [N]; nan where there is none.

        Raises:
            UserError: for a missing column, or one of another type.
        """
        found = []
        for path in self.shards:
            file = opened(path)
            if name not in file.schema_arrow.names:
                raise unknown_choice("data.label", name, file.schema_arrow.names, f"column of '{path}'")
            try:
                found.append(file.read(columns=[name]).column(name).cast("float64").to_numpy())
            except ValueError as error:
                raise UserError(f"data.label: column '{name}' of '{path}' holds no numbers ({error})") from error
        return np.concatenate(found)

    def _locate(self, index: int) -> tuple[int, int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        shard, inside = self._place[group]
        return int(shard), int(inside), int(index - (self._ends[group - 1] if group else 0))

    def _group(self, shard: int, group: int) -> Any:
        if self._process != os.getpid():  # open files do not survive a fork
            self._handles, self._groups, self._process = {}, OrderedDict(), os.getpid()
        if (shard, group) not in self._groups:
            if shard not in self._handles:
                self._handles[shard] = opened(self.shards[shard])
            try:
                table = self._handles[shard].read_row_group(group, columns=[self._column], use_threads=False)
            except ValueError as error:  # Arrow's own are ValueError and OSError
                raise OSError(str(error)) from error
            self._groups[shard, group] = table.column(self._column)
            if len(self._groups) > ROW_GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end((shard, group))
        return self._groups[shard, group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_groups": OrderedDict()}


class Texts(Sequence[str]):
    """A column of texts, kept in Arrow's memory: Python strings of millions of captions would fill it.

    Args:
        column: of strings; a missing one reads as ''.
    """

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [text or "" for text in self._column[index].to_pylist()]
        return self._column[int(index)].as_py() or ""


def opened(path: Path) -> Any:
    """A Parquet file, mapped into memory.

    Raises:
        UserError: when it is torn or no Parquet.
    """
    try:
        return need("pyarrow.parquet", "data=parquet", "data").ParquetFile(path, memory_map=True)
    except (ValueError, OSError) as error:
        raise UserError(f"data.root: cannot read '{path}' as Parquet ({error}); copy it again") from error


def _check_columns(path: Path, schema: Any, wanted: Mapping[str, str | None]) -> None:
    types = need("pyarrow.types", "data=parquet", "data")
    for key, name in wanted.items():
        if name is not None and name not in schema.names:
            raise unknown_choice(f"data.{key}", name, schema.names, f"column of '{path}'")
    held = schema.field(wanted["image"]).type
    content = held.field("bytes").type if types.is_struct(held) and held.get_field_index("bytes") >= 0 else held
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise UserError(
            f"data.image: column '{wanted['image']}' of '{path}' is {held}, expected bytes or a struct with them"
        )
    if wanted["label"] is not None and not types.is_integer(schema.field(wanted["label"]).type):
        found = schema.field(wanted["label"]).type
        raise UserError(f"data.label: column '{wanted['label']}' of '{path}' is {found}, expected integers")
    if wanted["caption"] is not None:
        found = schema.field(wanted["caption"]).type
        if not (types.is_string(found) or types.is_large_string(found)):
            raise UserError(f"data.caption: column '{wanted['caption']}' of '{path}' is {found}, expected texts")


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Names that the library ``datasets`` wrote into the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]] or None
    except (KeyError, TypeError, ValueError):
        return None  # no such metadata: then labels are numbers


class ParquetDataModule(ImageDataModule):
    """Batches of :class:`ParquetPictures`; the options are those of both.

    Args:
        root, on_corrupt, upscale, files, image, label, caption, num_classes: see :class:`ParquetPictures`.
        cache_features: as in the base, but off unless asked for: features of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        on_corrupt: str = "stop",
        upscale: bool = False,
        files: str = "**/*.parquet",
        image: str = "image",
        label: str | None = "label",
        caption: str | None = None,
        num_classes: int | None = None,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.root = root
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.files = files
        self.columns = {"image": image, "label": label, "caption": caption}
        self.expected_classes = num_classes

    def make_source(self) -> ParquetPictures:
        """Read schemas, labels and captions."""
        return ParquetPictures(
            self.root,
            self.image_size,
            self.on_corrupt,
            self.upscale,
            self.files,
            num_classes=self.expected_classes,
            **self.columns,
        )
