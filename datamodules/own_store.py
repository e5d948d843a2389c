"""Stores that the project makes itself: made once, continued when stopped, mended when damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from datamodules.progress import Advance, first_rank, progress
from datamodules.store import ArrayStore, DamagedStore, Manifest, StoreWriter, Verify, damages, exclusive
from repalign.errors import UserError

Make = Callable[[range, Advance], Mapping[str, np.ndarray]]


def ensure_store(
    folder: Path, title: str, plan: Callable[[], Manifest], make: Make, verify: Verify = "hash"
) -> ArrayStore:
    """Open a store of ours; make the shards that are missing, and again those that are damaged.

    Several processes may ask at once: one makes, the others wait. The content is checked by size, and by hash once per
    run (on rank 0) unless ``verify`` is 'size'.

    Args:
        folder: of the store; its name must stand for the content, an existing one is not compared with ``plan``.
        title: of the progress bar.
        plan: gives the manifest without files; called only when nothing is there.
        make: rows and a function that moves the bar -> the arrays of these rows.
        verify: 'hash' or 'size'.

    Raises:
        UserError: when the disk has no room for it.
    """
    depth: Verify = verify if first_rank() else "size"
    manifest, wrong = _inspect(folder, depth)
    if manifest is not None and not wrong and not manifest.missing():
        return ArrayStore(folder, manifest)  # without the lock: a finished store may lie on a read-only disk
    with exclusive(folder):
        # Another process may have finished it while this one waited.
        manifest, wrong = _inspect(folder, depth)
        if wrong:
            rest = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            print(f"{wrong[0]}{rest}; this store is ours: the damaged part is made again", flush=True)
        writer = StoreWriter(folder, plan() if manifest is None else manifest)
        if missing := writer.manifest.missing():
            _check_space(folder, writer.manifest)
            todo = sum(len(writer.manifest.rows_of(shard)) for shard in missing)
            with progress(title, writer.manifest.rows, writer.manifest.rows - todo) as advance:
                for shard in missing:
                    writer.write(shard, make(writer.manifest.rows_of(shard), advance))
        return ArrayStore(folder, writer.manifest)


def _check_space(folder: Path, manifest: Manifest) -> None:
    per_row = sum(spec.bytes_per_row for spec in manifest.arrays.values())
    needed = per_row * sum(len(manifest.rows_of(shard)) for shard in manifest.missing())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.cache_root: '{folder}' needs {needed / 2**30:.1f} GiB, found {free / 2**30:.1f} GiB free; set "
            "paths.cache=FOLDER or the environment variable REPALIGN_CACHE, or data.cache_latents=false or "
            "data.cache_features=false"
        )


def _inspect(folder: Path, verify: Verify) -> tuple[Manifest | None, list[str]]:
    """The manifest without its damaged files (None when there is none to go by), and what is wrong."""
    if not (folder / "manifest.json").exists():
        return None, []
    try:
        manifest = Manifest.load(folder)
    except DamagedStore as error:
        return None, [str(error)]
    wrong = damages(folder, manifest, verify)
    manifest.files = {name: entry for name, entry in manifest.files.items() if name not in wrong}
    return manifest, list(wrong.values())
