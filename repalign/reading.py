"""Files of other people: read as data or not at all."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


class Unreadable(RuntimeError):
    """A file is torn, foreign, or holds more than plain data; the message is one line without the file's name."""


def read_torch(file: str | Path, mmap: bool = False, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote: tensors and plain containers. No code of the file runs, whatever it says.

    There is no second, less careful try. An archive whose members are compressed is refused before it is opened:
    ``torch.save`` never compresses, and a few bytes could stand for more than the memory holds.

    Args:
        file: zip archive or the older format.
        mmap: leave the tensors on disk until they are read.
        map_location: see :func:`torch.load`.

    Raises:
        Unreadable: for anything that is not that.
    """
    try:
        _require_stored(Path(file))
        return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except Unreadable:
        raise
    except Exception as error:  # the reader raises nearly every kind, depending on where the file stops making sense
        raise Unreadable(f"{type(error).__name__}: {first_line(error)}") from error


def _require_stored(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Unreadable("its members are compressed, which torch.save never does")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise Unreadable("its members overlap")


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of a message, or the kind of the error where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:most] if lines else type(error).__name__
