"""Files that are written whole and can be told from damaged ones later: a SHA-256 beside each."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from repalign.errors import UserError
from repalign.folders import to_disk


class Damaged(UserError):
    """A file is not what was written."""


class _Hashed:
    """A file to write to that hashes what goes through it, and remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save would hide it behind its own complaint
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def seal_of(path: Path) -> Path:
    """The file beside ``path`` with its SHA-256, as ``sha256sum`` writes and checks it."""
    return path.with_name(f"{path.name}.sha256")


def write_sealed(path: Path, write: Callable[[Any], Any]) -> None:
    """Call ``write(file)`` on a file beside ``path``, flush it to the disk, leave its SHA-256, and only then rename it.

    A kill at any moment leaves the file that was there before, or the new one. An error leaves nothing half-written.

    Raises:
        OSError: when the disk is full, read-only or broken; the file that was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, seal = path.with_name(f".{path.name}.incomplete"), seal_of(path)
    partial_seal = seal.with_name(f".{seal.name}.incomplete")
    try:
        with open(partial, "wb") as file:
            hashed = _Hashed(file)
            try:
                write(hashed)
            except Exception as error:
                raise hashed.error or error from None
            _flushed(file)
        with open(partial_seal, "wb") as file:
            file.write(f"{hashed.digest.hexdigest()}  {path.name}\n".encode())
            _flushed(file)
        os.replace(partial_seal, seal)
        os.replace(partial, path)
        to_disk(path.parent)
    except OSError:
        for left in (partial, partial_seal):
            _remove(left)
        raise


def seal(path: Path) -> None:
    """Leave the SHA-256 of a file that a library has written."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with open(seal_of(path), "wb") as file:
        file.write(f"{digest}  {path.name}\n".encode())
        _flushed(file)


def require_whole(path: Path) -> None:
    """Compare a file with its seal; a file without one is taken as it is (it comes from elsewhere).

    Of a folder all files are compared; it has a seal for each of them and nothing else.

    Raises:
        Damaged: when they differ; the message names the file and what was found.
    """
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        files = {name for name in names if not name.endswith(".sha256")}
        odd = sorted(names ^ (files | {f"{name}.sha256" for name in files}))
        if odd or not files:
            raise Damaged(f"'{path}' is damaged: {f'{odd[0]!r} has no counterpart' if odd else 'it is empty'}")
        for name in sorted(files):
            require_whole(path / name)
        return
    try:
        sealed = seal_of(path).read_text().split()
    except FileNotFoundError:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sealed[:1] != [found]:
        raise Damaged(f"'{path}' is damaged: its SHA-256 begins with {found[:12]}, not as '{seal_of(path).name}' says")


def remove_sealed(path: Path) -> None:
    """Remove a file and its seal: the seal first, so that none is ever left alone."""
    seal_of(path).unlink(missing_ok=True)
    path.unlink()


def _flushed(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # a folder that cannot be written to holds nothing of ours
