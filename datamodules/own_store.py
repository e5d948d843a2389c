"""Stores that the project makes itself: made once, continued when stopped, mended when damaged, by many processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.channel_statistics import statistics_of, sums_of, write_statistics
from datamodules.files import entry_of, lock_path, locked, remove_incomplete
from datamodules.progress import Advance, first_rank, progress
from datamodules.store import MANIFEST, TEXT, ArrayStore, DamagedStore, Manifest, Verify, damages
from datamodules.texts import pack
from repalign.errors import UserError
from repalign.folders import write_atomically

Make = Callable[[range, Advance], Mapping[str, np.ndarray]]

MOMENTS = "moments"  # the array that statistics are kept of: [1 or 2, C, ...], mean and standard deviation


@dataclass(frozen=True)
class Share:
    """The shards that one of several processes makes: those whose number modulo ``parts`` is ``part``."""

    part: int = 0
    parts: int = 1

    def has(self, shard: int) -> bool:
        """Whether this process makes the shard."""
        return shard % self.parts == self.part

    def moved(self, places: int) -> Share:
        """The same share, beginning elsewhere: of many small stores each process then makes some."""
        return Share((self.part + places) % self.parts, self.parts)


WHOLE = Share()


class StoreWriter:
    """Writes the shards of a store whose manifest lies there already."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one shard of every array, then its record."""
        rows = self.manifest.rows_of(shard)
        remove_incomplete(self.folder, self.manifest.files_of(shard).values())
        for name, file in self.manifest.files_of(shard).items():
            spec, values = self.manifest.arrays[name], arrays[name]
            assert values.shape == (len(rows), *spec.shape), f"{name}: {values.shape} for {len(rows)} x {spec.shape}"
            values = pack(values.tolist()) if spec.dtype == TEXT else np.ascontiguousarray(values)
            assert spec.dtype == TEXT or values.dtype == spec.dtype, f"{name}: {values.dtype} for {spec.dtype}"
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(np.save, arr=values, allow_pickle=False))
            self.manifest.files[file] = entry_of(path)
        if MOMENTS in arrays:
            self.manifest.sums[f"{shard:05d}"] = sums_of(arrays[MOMENTS])
        self.manifest.save_shard(self.folder, shard)

    def finish(self) -> None:
        """Move the records of the shards into the manifest, with the statistics of all; nobody else may be writing."""
        if self.manifest.sums:
            sums = [self.manifest.sums[key] for key in sorted(self.manifest.sums)]
            self.manifest.info["statistics"] = statistics_of(sums)
            path = write_statistics(self.folder, self.manifest.info["statistics"])
            self.manifest.files[path.name] = entry_of(path)
        self.manifest.save(self.folder)
        for record in self.folder.glob("shard.*.json"):
            record.unlink()
        self.manifest.records = False
        remove_incomplete(self.folder)


def ensure_store(
    folder: Path,
    title: str,
    plan: Callable[[], Manifest],
    make: Make,
    verify: Verify = "hash",
    header: Mapping[str, Any] | None = None,
) -> ArrayStore:
    """Open a store of ours; make the shards that are missing, and again those that are damaged.

    Several processes may ask at once: one makes, the others wait. The content is checked by size, and by hash once per
    run (on rank 0) unless ``verify`` is 'size'.

    Args:
        folder: of the store.
        title: of the progress bar.
        plan: gives the manifest without files; called only when nothing is there.
        make: rows and a function that moves the bar -> the arrays of these rows.
        verify: 'hash' or 'size'.
        header: entries of ``info`` that an existing store must have.

    Raises:
        UserError: when the store there has another header, or the disk has no room.
    """
    depth: Verify = verify if first_rank() else "size"
    header = header or {}
    if (
        (manifest := load_manifest(folder)) is not None
        and _finished(manifest)
        and not _inspect(folder, manifest, depth, header)
    ):
        return ArrayStore(folder, manifest)  # without the lock: a finished store may lie on a read-only disk
    with locked(lock_path(folder)):
        writer, mended = _fill(folder, title, plan, make, WHOLE, depth, header)
        if mended or not _finished(writer.manifest):
            writer.finish()
        return ArrayStore(folder, writer.manifest)


def make_share(
    folder: Path,
    title: str,
    plan: Callable[[], Manifest],
    make: Make,
    share: Share,
    verify: Verify = "hash",
    header: Mapping[str, Any] | None = None,
) -> bool:
    """Make one process's share of a store; whoever ends last finishes it. Arguments as of :func:`ensure_store`.

    Returns:
        Whether the store is complete now.

    Raises:
        UserError: when the store there has another header, or the disk has no room.
    """
    with (
        locked(lock_path(folder, f".{share.part}-of-{share.parts}")),
        locked(lock_path(folder), shared=True),
    ):
        _, mended = _fill(folder, title, plan, make, share, verify, header or {})
    with locked(lock_path(folder), wait=False) as alone:
        manifest = Manifest.load(folder)
        if alone and not manifest.missing() and (mended or not _finished(manifest)):
            StoreWriter(folder, manifest).finish()
        return not manifest.missing()


def _fill(
    folder: Path,
    title: str,
    plan: Callable[[], Manifest],
    make: Make,
    share: Share,
    verify: Verify,
    header: Mapping[str, Any],
) -> tuple[StoreWriter, bool]:
    """Make what is missing of a share; also says whether something was damaged."""
    with locked(lock_path(folder, ".plan")):
        manifest = load_manifest(folder, speak=True) or _begin(folder, plan())
    if wrong := _inspect(folder, manifest, verify, header, share):
        rest = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        print(f"{wrong[0]}{rest}; this store is ours: the damaged part is made again", flush=True)
    writer = StoreWriter(folder, manifest)
    if missing := [shard for shard in manifest.missing() if share.has(shard)]:
        _check_space(folder, manifest)
        mine = sum(len(manifest.rows_of(s)) for s in range(manifest.shards) if share.has(s))
        todo = sum(len(manifest.rows_of(shard)) for shard in missing)
        with progress(title, mine, mine - todo) as advance:
            for shard in missing:
                writer.write(shard, make(manifest.rows_of(shard), advance))
    return writer, bool(wrong)


def _begin(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a store without files."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in folder.glob("shard.*.json"):  # of a store whose manifest was torn
        record.unlink()
    manifest.save(folder)
    return manifest


def _finished(manifest: Manifest) -> bool:
    return not manifest.missing() and not manifest.records


def _check_space(folder: Path, manifest: Manifest) -> None:
    per_row = sum(spec.bytes_per_row for spec in manifest.arrays.values())
    needed = per_row * sum(len(manifest.rows_of(shard)) for shard in manifest.missing())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.cache_root, task.keep: '{folder}' needs {needed / 2**30:.1f} GiB, found {free / 2**30:.1f} GiB "
            "free; set paths.cache=FOLDER or the environment variable REPALIGN_CACHE, data.latent_dtype=float16, or "
            "data.cache_latents=false or data.cache_features=false; for drawn pictures task.keep=FOLDER"
        )


def load_manifest(folder: Path, speak: bool = False) -> Manifest | None:
    """The manifest; None when there is none to go by."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        return Manifest.load(folder)
    except DamagedStore as error:
        if speak:
            print(f"{error}; this store is ours: it is made again", flush=True)
        return None


def _inspect(
    folder: Path, manifest: Manifest, verify: Verify, header: Mapping[str, Any], share: Share = WHOLE
) -> list[str]:
    """Take damaged files out of the manifest and say what is wrong with them; of a share, only its own shards."""
    _check_header(folder, manifest, header)
    others = {file for s in range(manifest.shards) if not share.has(s) for file in manifest.files_of(s).values()}
    mine = {name: entry for name, entry in manifest.files.items() if name not in others}
    wrong = damages(folder, replace(manifest, files=mine), verify)
    manifest.files = {name: entry for name, entry in manifest.files.items() if name not in wrong}
    return list(wrong.values())


def _check_header(folder: Path, manifest: Manifest, header: Mapping[str, Any]) -> None:
    """Refuse a store that was made otherwise."""
    differing = [key for key, value in header.items() if manifest.info.get(key) != value]
    if differing:
        told = "; ".join(f"{key}: found {manifest.info.get(key)!r}, expected {header[key]!r}" for key in differing)
        raise UserError(
            f"'{folder}' holds rows that were made otherwise ({told}); write to another folder (task.output or "
            "paths.cache), go back to the options it was made with, or remove it"
        )
