"""Arrays on disk: rows in memory-mapped .npy shards, and a manifest with the size and hash of every file.

A folder holds ``manifest.json`` and one file ``<array>.<shard>.npy`` per array and shard of ``shard_rows`` rows. Every
file is written under another name and renamed; the manifest follows after each shard. So a store that is half written
can be continued, and a file that is not in the manifest does not exist.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from datamodules.progress import progress
from repalign.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
Verify = Literal["hash", "size"]


class DamagedStore(UserError):
    """A file of a store is not what its manifest says."""


@dataclass(frozen=True)
class ArraySpec:
    """Type and shape of one row of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes_per_row(self) -> int:
        """Size of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass
class Manifest:
    """What a store holds.

    Attributes:
        rows: of the whole store.
        shard_rows: rows of every shard but the last.
        arrays: by name; a name may have a folder (``features/main``).
        info: whatever the writer wants to be known of the content.
        files: size and SHA-256 of every file written so far.
    """

    rows: int
    shard_rows: int
    arrays: dict[str, ArraySpec]
    info: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def files_of(self, shard: int) -> dict[str, str]:
        """Array name -> file name."""
        return {name: f"{name}.{shard:05d}.npy" for name in self.arrays}

    def missing(self) -> list[int]:
        """Shards of which a file is not written."""
        return [s for s in range(self.shards) if not set(self.files_of(s).values()) <= set(self.files)]

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically."""
        arrays = {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in self.arrays.items()}
        content = {"format": FORMAT, "rows": self.rows, "shard_rows": self.shard_rows, "arrays": arrays}
        content |= {"info": self.info, "files": self.files}
        content["sha256"] = _digest(content)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            DamagedStore: when it is missing, torn or changed.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            expected = content.pop("sha256")
        except FileNotFoundError:
            raise DamagedStore(f"'{path}' is missing; expected a store of arrays in '{folder}'") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DamagedStore(f"'{path}': torn (no complete JSON object)") from None
        if _digest(content) != expected:
            raise DamagedStore(f"'{path}': expected SHA-256 {expected[:16]}..., found {_digest(content)[:16]}...")
        if content["format"] != FORMAT:
            raise DamagedStore(f"'{path}': expected format {FORMAT}, found {content['format']}")
        arrays = {name: ArraySpec(spec["dtype"], tuple(spec["shape"])) for name, spec in content["arrays"].items()}
        return cls(content["rows"], content["shard_rows"], arrays, content["info"], content["files"])


class ArrayStore:
    """Reads rows of a complete store by index.

    Raises:
        DamagedStore: when the manifest is missing or torn, or the store is not complete.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder) if manifest is None else manifest
        if missing := self.manifest.missing():
            raise DamagedStore(
                f"'{folder}': {len(missing)} of {self.manifest.shards} shards were never written; the run that made "
                "it was stopped: run it again"
            )
        self._maps: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def info(self) -> dict[str, Any]:
        """What the writer said of the content."""
        return self.manifest.info

    @property
    def arrays(self) -> Collection[str]:
        """Names of the arrays."""
        return self.manifest.arrays.keys()

    def gather(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copies of the rows [B, *row shape], in the order asked."""
        spec = self.manifest.arrays[name]
        wanted = np.asarray(rows, dtype=np.int64)
        shards = wanted // self.manifest.shard_rows
        found = np.empty((len(wanted), *spec.shape), dtype=spec.dtype)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._map(name, int(shard))[wanted[here] - shard * self.manifest.shard_rows]
        return found

    def whole(self, name: str) -> np.ndarray:
        """The whole of a small array (labels, indices)."""
        return self.gather(name, np.arange(len(self)))

    def _map(self, name: str, shard: int) -> np.ndarray:
        file = self.manifest.files_of(shard)[name]
        if file not in self._maps:
            self._maps[file] = np.load(self.folder / file, mmap_mode="r", allow_pickle=False)
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files anew: a pickled memory map would carry its whole content.
        return {**self.__dict__, "_maps": {}}


class StoreWriter:
    """Writes the shards of a store; begins where an earlier writer stopped when the manifest already exists."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.rglob(".*.incomplete"):  # of a writer that was stopped
            torn.unlink()
        manifest.save(folder)

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one shard of every array, then the manifest."""
        rows = self.manifest.rows_of(shard)
        for name, file in self.manifest.files_of(shard).items():
            spec, values = self.manifest.arrays[name], np.ascontiguousarray(arrays[name])
            assert values.shape == (len(rows), *spec.shape), f"{name}: {values.shape} for {len(rows)} x {spec.shape}"
            assert values.dtype == spec.dtype, f"{name}: {values.dtype} for {spec.dtype}"
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(np.save, arr=values, allow_pickle=False))
            self.manifest.files[file] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        self.manifest.save(self.folder)


def damages(folder: Path, manifest: Manifest, verify: Verify) -> dict[str, str]:
    """Files that are not what the manifest says: name -> one line with what was found and what was expected."""
    found: dict[str, str] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size is None:
            found[name] = f"'{path}' is missing; expected {entry['bytes']} bytes"
        elif size != entry["bytes"]:
            found[name] = f"'{path}': expected {entry['bytes']} bytes, found {size}"
    if verify == "hash":
        whole = [name for name in manifest.files if name not in found]
        total = sum(manifest.files[name]["bytes"] for name in whole) >> 20
        # Small stores are checked in a moment; only a long check deserves a bar.
        with progress(f"checking {folder.name} (MiB)", total) if total > 2048 else nullcontext(_ignore) as advance:
            with ThreadPoolExecutor(4) as pool:
                for name, digest in zip(whole, pool.map(sha256_of, [folder / n for n in whole]), strict=True):
                    advance(manifest.files[name]["bytes"] >> 20)
                    if digest != manifest.files[name]["sha256"]:
                        expected = manifest.files[name]["sha256"]
                        found[name] = f"'{folder / name}': expected SHA-256 {expected[:16]}..., found {digest[:16]}..."
    return found


def _ignore(steps: int) -> None:
    """The bar that is not shown."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path`` and rename it: readers see the whole file or none."""
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(partial_path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_path, path)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a store; says so when another process has it and waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is making '{folder}'", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
