"""Training from stored latents and features alone, where the pictures are not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.cache import Making
from datamodules.outputs import Outputs
from datamodules.progress import first_rank
from datamodules.remote import RemoteFolder, RemoteStore, is_url
from datamodules.store import MANIFEST, ArrayStore, DamagedStore, Manifest, Verify, damages
from repalign.errors import UserError, unknown_choice

ON_CORRUPT = ("stop", "skip")

_REDIRECT = 0x7265646972  # Philox key of the rows that stand in for lost ones


class LatentFolder:
    """A folder of stores that ``task=precompute`` wrote for one set of pictures: ``cache/<pictures>``.

    Which store belongs to which network is in the manifests, so the folder may be copied and renamed. It may also lie
    elsewhere, behind a URL (:class:`datamodules.remote.RemoteFolder`): its files are checked when they are fetched.

    Args:
        root: the folder, or a URL such as 's3://bucket/folder'.
        image_size: of the pictures that the stores were made from.
        on_corrupt: 'stop' raises at a damaged shard; 'skip' says which rows are lost and reads intact rows in their
            place, drawn once, the same on every rank and in every run; the order of all others stays as it was.
        verify: 'hash' or 'size'.
        remote_cache: where files behind a URL are kept.

    Raises:
        UserError: when the folder is missing, holds no store, or stores of different pictures or sizes.
        DamagedStore: when a store is torn, not complete, or damaged with ``on_corrupt='stop'``.
    """

    has_images = False

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        verify: Verify = "hash",
        remote_cache: str | Path = "cache/remote",
    ) -> None:
        mend = "set data.root=FOLDER (data=latents also reads the environment variable REPALIGN_LATENTS)"
        if root is None:
            raise UserError(f"data.root: has no value; {mend}")
        if on_corrupt not in ON_CORRUPT:
            raise unknown_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
        self._remote = RemoteFolder(str(root), Path(remote_cache).expanduser()) if is_url(root) else None
        self.root = Path(root).expanduser() if self._remote is None else self._remote.folder
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; {mend}")
        self.on_corrupt = on_corrupt
        # Ranks must agree on what is skipped, so then each of them looks at the content itself.
        self._verify: Verify = verify if on_corrupt == "skip" or first_rank() else "size"
        manifests = {path.parent.name: Manifest.load(path.parent) for path in sorted(self.root.glob(f"*/{MANIFEST}"))}
        # A store of rendered pictures may lie beside; it names no network.
        self.manifests = {folder: m for folder, m in manifests.items() if "fingerprint" in m.info}
        if not self.manifests:
            raise UserError(f"data.root: no stored latents in '{root}'; task=precompute writes them, {mend}")
        first = next(iter(self.manifests.values())).info
        for folder, manifest in self.manifests.items():
            for key in ("source", "pictures", "image_size"):
                if manifest.info[key] != first[key]:
                    raise UserError(
                        f"data.root: '{self.root / folder}' has {key} {manifest.info[key]}, the stores before it "
                        f"{first[key]}; keep one set of pictures per folder"
                    )
        if first["image_size"] != image_size:
            raise UserError(
                f"data.image_size: found {image_size}, but '{root}' was made from pictures of {first['image_size']} px"
            )
        self.image_size = image_size
        self.class_names: Sequence[str] = first["class_names"]
        self.fingerprint: str = first["source"]
        self.attribution: str | None = first["attribution"]
        self._lost = np.zeros(first["pictures"], dtype=bool)
        self._opened: dict[str, ArrayStore | RemoteStore] = {}
        captioned = [folder for folder, m in self.manifests.items() if "caption" in m.arrays]
        labelled = self.open([*captioned, *self.manifests][0])
        self.labels = labelled.gather("label", self.redirect)
        self.captions: Sequence[str] | None = _Captions(labelled) if captioned else None

    def __len__(self) -> int:
        return len(self._lost)

    @property
    def redirect(self) -> np.ndarray:
        """Index -> an index whose rows are intact in every store opened so far, itself where possible; int64 [N].

        Raises:
            DamagedStore: when no row is intact.
        """
        intact = np.flatnonzero(~self._lost)
        if not len(intact):
            raise DamagedStore(f"data.root: no intact row in '{self.root}'; copy it again")
        # Spread over all: the neighbour alone would stand in for a whole shard.
        draws = np.random.Generator(np.random.Philox(key=_REDIRECT)).integers(len(intact), size=len(self))
        return np.where(self._lost, intact[draws], np.arange(len(self)))

    def find(self, name: str, fingerprint: str, views: int) -> ArrayStore | RemoteStore:
        """The store of a network's outputs, in float32 where both types are there.

        Args:
            name: 'latents' or 'features_<encoder>'.
            fingerprint: of the network.
            views: 2 when mirrored pictures are needed.

        Raises:
            UserError: when the folder has none; the line says what it has.
        """
        same = {folder: m for folder, m in self.manifests.items() if m.info["name"] == name}
        if not same:
            found = ", ".join(sorted({m.info["name"] for m in self.manifests.values()}))
            raise UserError(
                f"data.root: '{self.root}' has no {name}, only {found}; run task=precompute with this encoder where "
                "the pictures are"
            )
        made = {folder: m for folder, m in same.items() if m.info["fingerprint"] == fingerprint}
        if not made:
            others = ", ".join(m.info["fingerprint"] for m in same.values())
            raise UserError(
                f"data.root: the {name} in '{self.root}' are of another network: found {others}, expected {fingerprint}"
            )
        enough = [folder for folder, m in made.items() if m.info["views"] >= views]
        if not enough:
            raise UserError(
                f"data.horizontal_flip: '{self.root / next(iter(made))}' has no mirrored pictures; set "
                "data.horizontal_flip=false, or run task=precompute with data.horizontal_flip=true"
            )
        return self.open(max(enough, key=lambda folder: self.manifests[folder].info["dtype"] == "float32"))

    def open(self, folder: str) -> ArrayStore | RemoteStore:
        """A store, checked; damaged rows are noted when they are to be skipped."""
        if folder not in self._opened:
            manifest = self.manifests[folder]
            if self._remote is None:
                store = ArrayStore(self.root / folder, manifest)
                wrong = damages(store.folder, manifest, self._verify)
            else:
                store = RemoteStore(self._remote, folder, manifest)
                # What is to be skipped must be known before the first batch.
                wrong = store.damages() if self.on_corrupt == "skip" else {}
            in_shards = {file for shard in range(manifest.shards) for file in manifest.files_of(shard).values()}
            if others := [line for file, line in wrong.items() if file not in in_shards]:
                raise DamagedStore(f"data.root: {others[0]}; copy the file again")
            for shard in range(manifest.shards):
                for line in (wrong[file] for file in manifest.files_of(shard).values() if file in wrong):
                    self._lose(manifest.rows_of(shard), line)
            self._opened[folder] = store
        return self._opened[folder]

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """There are no pictures here.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"data: pictures are needed, but '{self.root}' holds latents and features alone; use the data set that "
            "they were made from, or reference statistics from a file"
        )

    def _lose(self, rows: range, line: str) -> None:
        text = f"data.root: {line} (rows {rows.start} to {rows.stop - 1})"
        if self.on_corrupt == "stop":
            raise DamagedStore(f"{text}; copy the file again, or set data.on_corrupt=skip to go on without these rows")
        self._lost[np.arange(rows.start, rows.stop) % len(self)] = True
        if first_rank():
            print(f"{text}: skipped, {int(self._lost.sum())} of {len(self)} pictures lost", flush=True)


class _Captions(Sequence[str]):
    """The texts of a store, read when they are asked for."""

    def __init__(self, store: ArrayStore | RemoteStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.info["pictures"]

    def __getitem__(self, index: Any) -> Any:
        return self.store.gather("caption", [index])[0]


class LatentDataModule(ImageDataModule):
    """Batches of :class:`LatentFolder`: no pictures, only what ``task=precompute`` stored.

    Args:
        root, on_corrupt, remote_cache: see :class:`LatentFolder`.
        image_size, batch_size, accumulate, num_workers, seed, horizontal_flip, verify: see
            :class:`datamodules.base.ImageDataModule`.
    """

    computes = False

    def __init__(
        self,
        *,
        root: str | Path | None,
        image_size: int,
        batch_size: int,
        on_corrupt: str = "stop",
        accumulate: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        horizontal_flip: bool = False,
        verify: Verify = "hash",
        remote_cache: str | Path = "cache/remote",
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            accumulate=accumulate,
            num_workers=num_workers,
            seed=seed,
            horizontal_flip=horizontal_flip,
            verify=verify,
        )
        self.root = root
        self.on_corrupt = on_corrupt
        self.remote_cache = remote_cache

    def make_source(self) -> LatentFolder:
        """Read the manifests."""
        return LatentFolder(self.root, self.image_size, self.on_corrupt, self.verify, self.remote_cache)

    def store_for(  # type: ignore[override]  # a store elsewhere has the reading half of the interface
        self, outputs: Outputs, making: Making
    ) -> ArrayStore | RemoteStore:
        """The store of a network's outputs; nothing can be computed here."""
        assert isinstance(self.source, LatentFolder)
        views = 2 if self.horizontal_flip and not outputs.of_captions else 1
        store = self.source.find(outputs.name, outputs.fingerprint, views)
        self.dataset.redirect = self.source.redirect
        return store
