"""Folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repalign.errors import UserError


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
