"""Pictures with boxes of objects, in COCO's layout."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.encoded import NO_CLASS, EncodedPictures, existing_root
from repalign.errors import UserError


class CocoPictures(EncodedPictures):
    """A folder of pictures and COCO's ``instances_*.json``: boxes by object class; pictures have no class (label 0).

    Boxes follow the centre square: cut at its border, left out when less than a tenth of them is inside. Of more than
    ``objects`` a picture keeps the largest. Object classes are numbered 0, 1, ... in the order of the file's ids.

    Args:
        root: folder of the pictures.
        annotations: the .json file.
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        objects: most boxes a picture.

    Raises:
        UserError: for a missing folder or file, or a file that is of another form.
    """

    class_names = NO_CLASS

    def __init__(
        self,
        root: str | Path | None,
        annotations: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        objects: int = 30,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        self.root = existing_root(root)
        content = _read(annotations)
        try:
            self.object_names = [entry["name"] for entry in sorted(content["categories"], key=lambda c: c["id"])]
            numbers = {id: k for k, id in enumerate(sorted(entry["id"] for entry in content["categories"]))}
            listed = sorted(content["images"], key=lambda entry: entry["file_name"])
            found: dict[int, list[tuple[int, list[float]]]] = defaultdict(list)
            for entry in content["annotations"]:
                found[entry["image_id"]].append((numbers[entry["category_id"]], entry["bbox"]))
            self._boxes = np.stack([_rows(entry, found[entry["id"]], objects) for entry in listed])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"data.annotations: '{annotations}' is not COCO's instances file (images, annotations, categories): "
                f"{type(error).__name__} {error}"
            ) from error
        self.files = [str(entry["file_name"]) for entry in listed]
        for name in self.files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"data.annotations: '{annotations}' lists '{name}', expected a file below '{root}'")
        self.labels = np.zeros(len(self.files), dtype=np.int64)
        self._digest = hashlib.blake2b(json.dumps(listed).encode() + self._boxes.tobytes(), digest_size=8).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over the list of pictures and all boxes."""
        return f"{self.root.resolve().name}-{self.image_size}px-{self._digest}"

    def place(self, index: int) -> str:
        """The path of a picture, quoted."""
        return f"'{self.root / self.files[index]}'"

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return (self.root / self.files[index]).read_bytes()

    def boxes(self, indices: Sequence[int]) -> np.ndarray:
        """Boxes [B, objects, 5]: class, x_0, y_0, x_1, y_1 in the square picture; rows of -1 are none."""
        return self._boxes[np.asarray(indices)]


def _rows(picture: dict[str, Any], objects: list[tuple[int, list[float]]], most: int) -> np.ndarray:
    side = min(picture["width"], picture["height"])
    left, top = (picture["width"] - side) / 2, (picture["height"] - side) / 2
    rows = []
    for number, (x, y, width, height) in objects:
        whole = np.array([x - left, y - top, x - left + width, y - top + height]) / side
        inside = whole.clip(0, 1)
        area, before = (max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (inside, whole))
        if before > 0 and area >= 0.1 * before:
            rows.append((area, [number, *inside]))
    rows.sort(key=lambda row: -row[0])
    found = np.full((most, 5), -1, dtype=np.float32)
    for k, (_, row) in enumerate(rows[:most]):
        found[k] = row
    return found


def _read(annotations: str | Path | None) -> Any:
    if annotations is None or not Path(annotations).expanduser().is_file():
        raise UserError(f"data.annotations: no file '{annotations}'; give COCO's instances_train2017.json")
    try:
        return json.loads(Path(annotations).expanduser().read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.annotations: '{annotations}' is no JSON ({error})") from error


class CocoDataModule(ImageDataModule):
    """Batches of :class:`CocoPictures`; the options are those of both.

    Args:
        root, annotations, on_corrupt, upscale, objects: see :class:`CocoPictures`.
        cache_features: as in the base, but off unless asked for: features of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        annotations: str | Path | None,
        on_corrupt: str = "stop",
        upscale: bool = False,
        objects: int = 30,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.root = root
        self.annotations = annotations
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.objects = objects

    def make_source(self) -> CocoPictures:
        """Read the annotations."""
        return CocoPictures(self.root, self.annotations, self.image_size, self.on_corrupt, self.upscale, self.objects)
