"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from repalign.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it: readers see the whole file or none."""
    # Not the process id: on a disk that several machines share it is no name.
    partial_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")
    with open(partial_path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_path, path)


def write_text(path: Path, text: str) -> None:
    """A small text file (UTF-8), whole or not there; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill, beside the target; it gets the target's name when everything in it is on the disk.

    Args:
        target: must not exist, or be an empty folder.

    Raises:
        UserError: naming ``task.output`` when it holds something.
    """
    target = Path(target)
    check_new(target)
    partial = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            to_disk(path)
        if target.exists():
            target.rmdir()
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(target: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: naming ``task.output``.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"task.output: '{target}' exists; give a new folder")


def to_disk(path: Path) -> None:
    """Flush a file or the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
