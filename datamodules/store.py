"""Arrays on disk: rows in memory-mapped .npy shards, and a manifest with the size and checksums of every file.

A folder holds ``manifest.json`` and one file ``<array>.<shard>.npy`` per array and shard of ``shard_rows`` rows. Every
file is written under another name and renamed, so it is whole or not there. While a store is made, ``shard.<n>.json``
follows the files of shard n; a file that no record names does not exist. When the last shard is there the records move
into the manifest. So a store that is half written can be continued, by any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.files import FileEntry, damaged_bytes, digest_of, sha256_of
from datamodules.progress import progress
from datamodules.texts import unpack
from repalign.errors import UserError
from repalign.folders import write_text

FORMAT = 2
MANIFEST = "manifest.json"
TEXT = "utf8"  # type of an array of texts, see datamodules/texts.py
Verify = Literal["hash", "size"]

_TEXT_BYTES = 128  # of a text, for estimates


class DamagedStore(UserError):
    """A file of a store is not what its manifest says."""


@dataclass(frozen=True)
class ArraySpec:
    """Type and shape of one row of an array; type 'utf8' for texts of any length."""

    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def bytes_per_row(self) -> int:
        """Size of a row; of texts an estimate."""
        if self.dtype == TEXT:
            return _TEXT_BYTES
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class Manifest:
    """What a store holds.

    Attributes:
        rows: of the whole store.
        shard_rows: rows of every shard but the last.
        arrays: by name; a name may have a folder (``features/main``).
        info: whatever the writer wants to be known of the content.
        files: size and checksums of every file written so far.
        sums: per shard, what statistics of the whole are added up from.
        records: whether a record of a single shard lies beside the manifest.
    """

    rows: int
    shard_rows: int
    arrays: dict[str, ArraySpec]
    info: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)
    sums: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: bool = False

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
        # Sorted: the order in which shards were made leaves no trace.
        content |= {
            "info": self.info,
            "files": dict(sorted(self.files.items())),
            "sums": dict(sorted(self.sums.items())),
        }
        _write_json(folder / MANIFEST, content)

    def save_shard(self, folder: Path, shard: int) -> None:
        """Write the record of one shard, whose files are in ``files``."""
        files = {name: self.files[name] for name in self.files_of(shard).values()}
        sums = {key: value for key, value in self.sums.items() if key == f"{shard:05d}"}
        _write_json(folder / f"shard.{shard:05d}.json", {"files": files, "sums": sums})
        self.records = True

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``, and the records of shards that have not moved into it yet.

        Raises:
            DamagedStore: when it is missing, torn or changed.
        """
        # Records first: whoever moves them writes the manifest before removing them.
        records = [record for path in sorted(folder.glob("shard.*.json")) if (record := _read_record(path))]
        content = _read_json(folder / MANIFEST)
        if content["format"] != FORMAT:
            raise DamagedStore(f"'{folder / MANIFEST}': expected format {FORMAT}, found {content['format']}")
        try:
            arrays = {name: _spec(name, spec) for name, spec in content["arrays"].items()}
            manifest = cls(content["rows"], content["shard_rows"], arrays, content["info"], content["files"])
            if not (type(manifest.rows) is type(manifest.shard_rows) is int and 0 < manifest.shard_rows):
                raise ValueError(f"rows {manifest.rows!r}, shard_rows {manifest.shard_rows!r}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedStore(f"'{folder / MANIFEST}': is no manifest of a store ({error})") from error
        manifest.sums = content["sums"]
        manifest.records = bool(records)
        for record in records:
            manifest.files |= record["files"]
            manifest.sums |= record["sums"]
        return manifest


class ArrayStore:
    """Reads rows of a complete store by index; threads may read at once.

    Raises:
        DamagedStore: when the manifest is missing or torn, or the store is not complete.
    """

    mapped = True  # its rows are copied from memory maps

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder) if manifest is None else manifest
        if missing := self.manifest.missing():
            raise DamagedStore(
                f"'{folder}': {len(missing)} of {self.manifest.shards} shards were never written; the run that made "
                "it was stopped: run it again"
            )
        self._opened: dict[str, dict[int, memoryview]] = {name: {} for name in self.manifest.arrays}

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
        """Copies of the rows [B, *row shape], in the order asked; of texts, an array of str."""
        spec, wanted = self.manifest.arrays[name], np.asarray(rows, dtype=np.int64)
        shards, inside = np.divmod(wanted, self.manifest.shard_rows)
        numbers, opened = shards.tolist(), self._opened[name]
        for shard in set(numbers).difference(opened):
            self._open(name, shard)
        if spec.dtype == TEXT:
            places = zip(numbers, inside.tolist(), strict=True)
            texts = [unpack(np.asarray(opened[s]), len(self.manifest.rows_of(s)), row) for s, row in places]
            return np.array(texts, dtype=object)
        # Slices of bytes, joined: a batch of a shuffled stream has about one row per shard, and to index an array per
        # shard, or to assign row by row, costs more than the copy.
        size = spec.bytes_per_row
        begins = (inside * size).tolist()
        joined = bytearray().join([opened[s][at : at + size] for s, at in zip(numbers, begins, strict=True)])
        return np.ndarray((len(wanted), *spec.shape), spec.dtype, joined)

    def whole(self, name: str) -> np.ndarray:
        """The whole of a small array (labels, indices)."""
        spec = self.manifest.arrays[name]
        joined = bytearray().join([self._open(name, shard) for shard in range(self.manifest.shards)])
        return np.ndarray((len(self), *spec.shape), spec.dtype, joined)

    def _open(self, name: str, shard: int) -> memoryview:
        """The content of a shard, memory-mapped, as bytes."""
        if shard not in self._opened[name]:
            path = self.folder / self.manifest.files_of(shard)[name]
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DamagedStore(
                    f"'{path}' cannot be read ({error}); copy it again, or make the store again"
                ) from error
            self._opened[name][shard] = np.asarray(mapped).reshape(-1).view(np.uint8).data
        return self._opened[name][shard]

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files anew: a pickled memory map would carry its whole content.
        return {**self.__dict__, "_opened": {name: {} for name in self._opened}}


def damages(folder: Path, manifest: Manifest, verify: Verify) -> dict[str, str]:
    """Files that are not what the manifest says: name -> one line with what was found and what was expected.

    The line names the byte offset where a short file ends, or the bytes between which the content differs.
    """
    found: dict[str, str] = {}
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size is None:
            found[name] = f"'{path}' is missing; expected {entry['bytes']} bytes"
        elif size < entry["bytes"]:
            found[name] = f"'{path}' ends at byte {size}, expected {entry['bytes']} bytes"
        elif size > entry["bytes"]:
            found[name] = f"'{path}' goes on after byte {entry['bytes']}: expected that many bytes, found {size}"
    if verify == "hash":
        whole = [name for name in manifest.files if name not in found]
        total = sum(manifest.files[name]["bytes"] for name in whole) >> 20
        # Small stores are checked in a moment; only a long check deserves a bar.
        with progress(f"checking {folder.name} (MiB)", total) if total > 2048 else nullcontext(_ignore) as advance:
            with ThreadPoolExecutor(4) as pool:
                for name, digest in zip(whole, pool.map(sha256_of, [folder / n for n in whole]), strict=True):
                    entry = manifest.files[name]
                    advance(entry["bytes"] >> 20)
                    if digest != entry["sha256"]:
                        where = damaged_bytes(folder / name, entry)
                        found[name] = (
                            f"'{folder / name}' differs between bytes {where.start} and {where.stop - 1}: expected "
                            f"SHA-256 {entry['sha256'][:16]}..., found {digest[:16]}..."
                        )
    return found


def _spec(name: str, held: Mapping[str, Any]) -> ArraySpec:
    """An array of a manifest; its name is part of a path, and its rows are plain numbers or texts."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"array '{name}' lies outside the store")
    if held["dtype"] != TEXT and np.dtype(held["dtype"]).hasobject:
        raise ValueError(f"array '{name}' holds objects")
    if not all(type(side) is int and side >= 0 for side in held["shape"]):
        raise ValueError(f"array '{name}' has shape {held['shape']}")
    return ArraySpec(held["dtype"], tuple(held["shape"]))


def _ignore(steps: int) -> None:
    """The bar that is not shown."""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({**content, "sha256": digest_of(content)}, indent=1, ensure_ascii=False)
    write_text(path, text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("sha256")
    except FileNotFoundError:
        raise DamagedStore(f"'{path}' is missing; expected a store of arrays in '{path.parent}'") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedStore(f"'{path}': torn (no complete JSON object)") from None
    if digest_of(content) != expected:
        raise DamagedStore(f"'{path}': expected SHA-256 {expected[:16]}..., found {digest_of(content)[:16]}...")
    return content


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a shard; None when it is torn (the shard is made again) or has just moved into the manifest."""
    try:
        return _read_json(path)
    except DamagedStore:
        return None
