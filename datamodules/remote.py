"""Stores on another machine: fetched file by file at first use, checked, kept."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.core
import numpy as np

from datamodules.cache import short
from datamodules.files import sha256_of
from datamodules.progress import progress
from datamodules.store import MANIFEST, ArrayStore, DamagedStore, Manifest
from repalign.errors import UserError

TRIES = 3
PAUSE = 2.0  # seconds before the second try, twice as many before the third
AT_ONCE = 8  # files
SHOWN_FROM = 64 * 2**20  # bytes from which a fetch has a progress bar

T = TypeVar("T")


def is_url(root: object) -> bool:
    """Whether a root names a place of another file system ('s3://bucket/folder'), not a folder here."""
    return "://" in str(root)


class RemoteFolder:
    """A folder behind a URL, and its copy on this machine.

    The copy is complete in manifests and grows by the files that are asked for. Each is fetched by one process of the
    machine while the others wait, compared with the size and SHA-256 of its manifest, and only then put in its place.
    The copy's name stands for URL and manifests: a store that was replaced is fetched anew.

    Args:
        url: of a folder of stores, in any protocol of fsspec (s3, gs, hf, memory, file, ...); credentials are those
            of its package.
        cache: folder of the copies.

    Raises:
        UserError: when the protocol is unknown or its package missing, nothing can be read there, or there is no store.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self.url = url.rstrip("/")
        try:
            manifests = self._tried(self._manifests, self.url)
        except DamagedStore:
            manifests = {}  # some file systems refuse to look into a folder that is not there
        if not manifests:
            raise UserError(f"data.root: no stored latents at '{url}', expected {self.url}/STORE/{MANIFEST}")
        content = "".join(f"{name}\0{text.hex()}" for name, text in sorted(manifests.items()))
        self.folder = cache / f"{self.url.rpartition('/')[2]}-{short(self.url + content)}"
        for name, text in manifests.items():
            path = self.folder / name / MANIFEST
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with _placing(path) as partial:
                    partial.write_bytes(text)

    def bring(self, name: str, entry: dict[str, Any]) -> Path:
        """A file's place on this machine; fetched when it is not there in its right size.

        Args:
            name: relative to the folder.
            entry: 'bytes' and 'sha256' of its manifest.

        Raises:
            DamagedStore: when it is missing there, or is not what the manifest says.
            UserError: when it cannot be read.
        """
        path, url = self.folder / name, f"{self.url}/{name}"
        if _has(path, entry):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _has(path, entry):  # another process may have fetched it while this one waited
                with _placing(path) as partial:
                    self._tried(lambda system, place: system.get_file(place, str(partial)), url)
                    _check(partial, url, entry)
        return path

    def _manifests(self, system: Any, place: str) -> dict[str, bytes]:
        found = system.glob(f"{place}/*/{MANIFEST}")
        return {path.split("/")[-2]: system.cat_file(path) for path in found}

    def _tried(self, action: Callable[[Any, str], T], url: str) -> T:
        """Call ``action(file system, place)``; a network may fail once."""
        for attempt in range(TRIES):
            try:
                # Asked for each time: fsspec keeps them, and gives a process that was forked a new one.
                return action(*fsspec.core.url_to_fs(url))
            except FileNotFoundError as error:
                raise DamagedStore(f"'{url}' is missing") from error
            except ImportError as error:
                raise UserError(
                    f"data.root: '{self.url}' needs a package that is not installed ({error}); pip install "
                    "'repalign[remote]'"
                ) from error
            except ValueError as error:
                raise UserError(f"data.root: '{self.url}' is no place that can be read ({error})") from error
            except Exception as error:  # every file system has its own
                if attempt == TRIES - 1:
                    raise UserError(
                        f"data.root: cannot read '{url}' ({type(error).__name__}: {error}); look at the address, the "
                        "credentials and the network"
                    ) from error
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")


class RemoteStore:
    """A store of a :class:`RemoteFolder`: the reading half of :class:`datamodules.store.ArrayStore`.

    A batch of a shuffled stream touches about as many shards as it has rows, so the first batches bring in nearly the
    whole store; later ones read the disk.

    Args:
        remote: the folder.
        name: of the store in it.
        manifest: of the store.
    """

    mapped = False  # a read may fetch files first

    def __init__(self, remote: RemoteFolder, name: str, manifest: Manifest) -> None:
        self._remote = remote
        self._name = name
        self._store = ArrayStore(remote.folder / name, manifest)
        self._here: set[tuple[str, int]] = set()
        self.folder = self._store.folder
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self._store)

    @property
    def info(self) -> dict[str, Any]:
        """What the writer said of the content."""
        return self._store.info

    @property
    def arrays(self) -> Collection[str]:
        """Names of the arrays."""
        return self._store.arrays

    def gather(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copies of the rows [B, *row shape], in the order asked; missing shards are fetched first."""
        wanted = np.asarray(rows, dtype=np.int64)
        shards = {(name, int(shard)) for shard in np.unique(wanted // self.manifest.shard_rows)} - self._here
        if shards:
            files = {self.manifest.files_of(shard)[array]: (array, shard) for array, shard in shards}
            for file, error in self._bring(files):
                if error is not None:
                    raise DamagedStore(
                        f"data.root: {error} (rows {self.manifest.rows_of(files[file][1]).start} to "
                        f"{self.manifest.rows_of(files[file][1]).stop - 1}); copy the file again, or set "
                        "data.on_corrupt=skip to go on without these rows"
                    ) from error
            self._here |= shards
        return self._store.gather(name, wanted)

    def damages(self) -> dict[str, str]:
        """Fetch everything; files that are not what the manifest says: name -> one line."""
        return {file: str(error) for file, error in self._bring(self.manifest.files) if error is not None}

    def _bring(self, files: Iterable[str]) -> Iterator[tuple[str, DamagedStore | None]]:
        entries = {file: self.manifest.files[file] for file in files}
        missing = [file for file in entries if not _has(self.folder / file, entries[file])]
        total = sum(entries[file]["bytes"] for file in missing)

        def bring(file: str) -> DamagedStore | None:
            try:
                self._remote.bring(f"{self._name}/{file}", entries[file])
            except DamagedStore as error:
                return error
            return None

        with _bar(f"fetching {self._name} (MiB)", total) as advance, ThreadPoolExecutor(AT_ONCE) as pool:
            for file, error in zip(missing, pool.map(bring, missing), strict=True):
                advance(entries[file]["bytes"] >> 20)
                yield file, error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": set()}


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    if total < SHOWN_FROM:
        yield lambda steps: None
    else:
        with progress(title, total >> 20) as advance:
            yield advance


def _has(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _check(path: Path, url: str, entry: dict[str, Any]) -> None:
    if (size := path.stat().st_size) != entry["bytes"]:
        raise DamagedStore(f"'{url}': expected {entry['bytes']} bytes, found {size}")
    if (digest := sha256_of(path)) != entry["sha256"]:
        raise DamagedStore(f"'{url}': expected SHA-256 {entry['sha256'][:16]}..., found {digest[:16]}...")


@contextmanager
def _placing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` when the block ends well, and is removed when not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
