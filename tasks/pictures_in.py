"""Generated pictures from a folder, from ADM's npz, or from shards that this project drew."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from datamodules.files import digest_of, sha256_of
from datamodules.pictures import DECODING, open_picture
from datamodules.store import MANIFEST, ArrayStore, Manifest
from repalign.errors import UserError
from tasks.drawing import pictures_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_pictures(path: Path, batch_size: int, key: str) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """Pictures in [0, 1], batch by batch.

    Args:
        path: a folder with pictures (any depth, in the order of their names), a folder of shards
            (:mod:`tasks.drawing`), or an .npz whose ``arr_0`` is uint8 [N, H, W, 3].
        batch_size: pictures at once; a large npz is streamed, not loaded.
        key: the configuration key, for messages.

    Raises:
        UserError: when nothing is there, a file is torn, or sizes differ.
    """
    if (path / MANIFEST).is_file():
        yield from (pixels.float() / 255 for _, _, pixels in pictures_of(ArrayStore(path), batch_size))
    elif path.is_dir():
        yield from _from_folder(path, batch_size, key)
    else:
        _require_npz(path, key)
        yield from _from_npz(path, batch_size, key)


def count_pictures(path: Path, key: str) -> int:
    """How many pictures :func:`read_pictures` will give; the same errors for what is not there."""
    if (path / MANIFEST).is_file():
        return len(ArrayStore(path))
    if path.is_dir():
        return len(picture_files(path))
    _require_npz(path, key)
    with _opened(path, key) as (_, shape):
        return shape[0]


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def fingerprint_of(path: Path) -> str:
    """Stands for the content of a file, or of all pictures below a folder: sixteen hexadecimal digits.

    Names and times have no part in it beyond the order of the pictures, so a copy elsewhere has the same.
    """
    if path.is_file():
        return sha256_of(path)[:16]
    if (path / MANIFEST).is_file():
        return digest_of({name: entry["sha256"] for name, entry in Manifest.load(path).files.items()})[:16]
    files = picture_files(path)
    with ThreadPoolExecutor(4) as pool:
        return hashlib.sha256("".join(pool.map(sha256_of, files)).encode()).hexdigest()[:16]


def holds(path: Path, array: str) -> bool:
    """Whether an .npz file has an array of this name."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{array}.npy" in archive.namelist()


def _from_folder(folder: Path, batch_size: int, key: str) -> Iterator[Tensor]:
    files = picture_files(folder)
    if not files:
        raise UserError(f"{key}: no picture ({', '.join(SUFFIXES)}) below '{folder}'")
    size: tuple[int, int] | None = None
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            try:
                with open_picture(file) as picture:
                    pixels = np.array(picture.convert("RGB"))
            except DECODING as error:
                raise UserError(f"{key}: '{file}' cannot be read as a picture ({error})") from error
            size = size or pixels.shape[:2]
            if pixels.shape[:2] != size:
                raise UserError(f"{key}: '{file}' is {pixels.shape[:2]}, the pictures before it {size} (height, width)")
            batch.append(torch.from_numpy(pixels))
        yield _to_float(torch.stack(batch))


MOST_PIXELS = 8192  # of a side, in an .npz


def _require_npz(path: Path, key: str) -> None:
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{key}: no folder and no .npz file at '{path}'")


@contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The bytes of arr_0 after its header, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
                raise UserError(f"{key}: arr_0 of '{path}' is {dtype} {shape}, expected uint8 [N, H, W, 3]")
            if max(shape[1:3]) > MOST_PIXELS:  # a batch of them would fill the memory, however small the file
                raise UserError(f"{key}: arr_0 of '{path}' is {shape}, expected sides of at most {MOST_PIXELS}")
            yield file, shape
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: '{path}' cannot be read ({error}); expected arr_0 uint8 [N, H, W, 3]") from error


def _from_npz(path: Path, batch_size: int, key: str) -> Iterator[Tensor]:
    with _opened(path, key) as (file, shape):
        for start in range(0, shape[0], batch_size):
            rows = min(batch_size, shape[0] - start)
            content = bytearray(file.read(rows * shape[1] * shape[2] * 3))
            yield _to_float(torch.frombuffer(content, dtype=torch.uint8).reshape(rows, *shape[1:]))


def _to_float(rows: Tensor) -> Tensor:
    return rearrange(rows, "b h w c -> b c h w").float() / 255
