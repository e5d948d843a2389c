"""Pictures with a class for every pixel: a folder of pictures, a folder of maps."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from datamodules.base import ImageDataModule
from datamodules.encoded import NO_CLASS, EncodedPictures, existing_root
from datamodules.image_folder import SUFFIXES
from datamodules.images import center_crop_to
from datamodules.pictures import DECODING, open_picture
from repalign.errors import UserError


class SemanticMaps(EncodedPictures):
    """A folder of pictures and one of maps with the same names: ADE20K, COCO-Stuff, Cityscapes in this form.

    A map is a PNG of one channel (grey, or of a palette) whose values are class numbers, as large as its picture. It
    is cut like the picture, without mixing classes. Pictures have no class of their own (label 0).

    Args:
        root: folder of the pictures, at any depth.
        maps: folder of the maps, with the same folders in it: root/a/b.jpg and maps/a/b.png.
        classes: number of classes; a larger value is an error.
        offset: subtracted from every value (1 for ADE20K, whose 0 means that there is none).
        void: value for pixels without a class, after the offset they are -1; None when there is none.
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.

    Raises:
        UserError: for a missing folder or map; later for a map that is of another size or form, or has a value that is
            no class.
    """

    class_names = NO_CLASS

    def __init__(
        self,
        root: str | Path | None,
        maps: str | Path | None,
        image_size: int,
        classes: int,
        offset: int = 0,
        void: int | None = 255,
        on_corrupt: str = "stop",
        upscale: bool = False,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        self.root = existing_root(root)
        if maps is None or not Path(maps).expanduser().is_dir():
            raise UserError(
                f"data.maps: no folder '{maps}'; expected one of PNG files named as the pictures in '{root}'"
            )
        self.maps = Path(maps).expanduser()
        self.classes, self.offset, self.void = classes, offset, void
        self.files = sorted(
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(self.root)
            for name in names
            if name.lower().endswith(SUFFIXES)
        )
        if not self.files:
            raise UserError(f"data.root: '{root}' has no picture ({', '.join(SUFFIXES)})")
        absent = [name for name in self.files if not self.map_of(name).is_file()]
        if absent:
            raise UserError(
                f"data.maps: {len(absent)} of {len(self.files)} pictures have no map, the first is "
                f"'{self.root / absent[0]}'; expected '{self.map_of(absent[0])}'"
            )
        self.labels = np.zeros(len(self.files), dtype=np.int64)
        digest = hashlib.blake2b(digest_size=8)
        for name in self.files:
            digest.update(f"{name}\0{os.stat(self.root / name).st_size}\n".encode())
        self._digest = digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of the pictures; maps are read, never stored."""
        return f"{self.root.resolve().name}-{self.image_size}px-{self._digest}"

    def map_of(self, name: str) -> Path:
        """Where the map of a picture lies."""
        return (self.maps / name).with_suffix(".png")

    def place(self, index: int) -> str:
        """The path of a picture, quoted."""
        return f"'{self.root / self.files[index]}'"

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return (self.root / self.files[index]).read_bytes()

    def segmentation(self, indices: Sequence[int]) -> np.ndarray:
        """Class of every pixel, int64 [B, H, W]; -1 where it has none.

        Raises:
            UserError: for a map that does not fit its picture or the classes.
        """
        return np.stack([self._map(index) for index in indices])

    def _map(self, index: int) -> np.ndarray:
        path = self.map_of(self.files[index])
        try:
            image = open_picture(io.BytesIO(path.read_bytes()))
            image.load()
        except DECODING as error:
            raise UserError(f"data.maps: cannot read '{path}' ({error})") from error
        if len(image.getbands()) != 1:
            raise UserError(f"data.maps: '{path}' has {len(image.getbands())} channels, expected one of class numbers")
        picture = self._open(index)
        if image.size != picture.size:
            raise UserError(
                f"data.maps: '{path}' has {image.width}x{image.height} pixels, its picture {self.place(index)} has "
                f"{picture.width}x{picture.height}"
            )
        numbers = center_crop_to(_as_integers(image), self.image_size, self.image_size, whole=True)
        values = np.asarray(numbers, dtype=np.int64)
        none = values == self.void if self.void is not None else np.zeros(values.shape, dtype=bool)
        values = np.where(none, -1, values - self.offset)
        wrong = (values < -1) | (values >= self.classes)
        if wrong.any():
            raise UserError(
                f"data.maps: '{path}' has the value {values[wrong][0] + self.offset}, expected {self.offset} to "
                f"{self.classes + self.offset - 1}"
                + (f", or {self.void} for none" if self.void is not None else "")
                + "; see data.classes, data.offset and data.void"
            )
        return values


def _as_integers(image: PIL.Image.Image) -> PIL.Image.Image:
    """Class numbers as 32-bit integers: those of a palette are its places, not its colours."""
    return PIL.Image.fromarray(np.asarray(image).astype(np.int32))


class SemanticMapsDataModule(ImageDataModule):
    """Batches of :class:`SemanticMaps`; the options are those of both.

    Args:
        root, maps, classes, offset, void, on_corrupt, upscale: see :class:`SemanticMaps`.
        cache_features: as in the base, but off unless asked for: features of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        maps: str | Path | None,
        classes: int,
        offset: int = 0,
        void: int | None = 255,
        on_corrupt: str = "stop",
        upscale: bool = False,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.root = root
        self.maps = maps
        self.classes, self.offset, self.void = classes, offset, void
        self.on_corrupt = on_corrupt
        self.upscale = upscale

    def make_source(self) -> SemanticMaps:
        """List pictures and maps."""
        fixed = (self.classes, self.offset, self.void, self.on_corrupt, self.upscale)
        return SemanticMaps(self.root, self.maps, self.image_size, *fixed)
