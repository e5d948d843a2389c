"""Files that are whole or not there, and what is kept to tell whether they are still whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 2**20  # bytes per CRC-32: how closely a damaged place is named

FileEntry = dict[str, Any]  # bytes, sha256, crc32 (eight hexadecimal digits per block, joined)


def remove_incomplete(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove what stopped writers left of the named files of a folder, or of all files below it."""
    if names is None:
        torn = list(folder.rglob(".*.incomplete"))
    else:
        paths = [folder / name for name in names]
        torn = [left for path in paths for left in path.parent.glob(f".{path.name}.*.incomplete")]
    for path in torn:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of a folder that of its files' names and sums."""
    if path.is_dir():
        return digest_of({file.name: sha256_of(file) for file in path.iterdir()})
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def entry_of(path: Path) -> FileEntry:
    """Size and checksums of a file."""
    digest, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            blocks.append(f"{zlib.crc32(block):08x}")
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest(), "crc32": "".join(blocks)}


def damaged_bytes(path: Path, entry: FileEntry) -> range:
    """From the first to the last block of a file of the right size whose checksum is wrong."""
    found = entry_of(path)["crc32"]
    wrong = [i for i in range(0, len(found), 8) if found[i : i + 8] != entry["crc32"][i : i + 8]]
    return range(wrong[0] // 8 * BLOCK, min((wrong[-1] // 8 + 1) * BLOCK, entry["bytes"])) if wrong else range(0)


def lock_path(folder: Path, suffix: str = "") -> Path:
    """The lock file of a folder, beside it."""
    return folder.with_name(f".{folder.name}{suffix}.lock")


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; says so when another process has it and waits.

    Args:
        path: of the lock file.
        shared: with others who ask so too, but with nobody who wants it alone.
        wait: False to go on without it when it is taken.

    Yields:
        Whether it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            print(f"waiting for another run that holds '{path}'", flush=True)
            fcntl.flock(file, kind)
        yield True
