"""Pictures drawn into shards: a run that is killed goes on where it was, several processes share the work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from callbacks.pictures import Generator, generate
from callbacks.prompts import Wanted, rows_of
from datamodules.own_store import WHOLE, Share, ensure_store, make_share
from datamodules.progress import Advance
from datamodules.store import ArraySpec, ArrayStore, Manifest
from repalign.metrics.features import to_uint8

SHARD = 256  # pictures, at least: what a killed process loses

Take = Callable[[Int[Tensor, " b"], UInt8[Tensor, "b 3 h w"]], None]  # serial numbers, pictures


class Drawing:
    """Generated pictures in a store, ``image`` uint8 [H, W, 3] and ``label``, by serial number.

    Of captions, ``label`` is the number of the first that reads the same.

    Picture i is a function of the settings and of i, so shards may be drawn in any order, by any number of processes,
    again after a kill: the store is the same, byte by byte, for one batch size. Its folder is named by the settings:
    pictures of other settings lie beside it.

    Args:
        root: folder of all drawings.
        settings: everything the pictures depend on (weights, sampler, guidance, seed, labels, ...).
        wanted: class or caption of each picture.
        generator: labels or captions, and randomness -> pictures.
        seed: of every draw.
        batch_size: pictures at once.
        rounding: to bytes.
        device: of the generator.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        wanted: Wanted,
        generator: Generator,
        seed: int,
        batch_size: int,
        rounding: str,
        device: torch.device,
    ) -> None:
        # Through JSON, as it will be compared with what the manifest holds.
        self.header: dict[str, Any] = {"settings": json.loads(json.dumps(settings, default=str))}
        text = json.dumps(self.header, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.wanted, self.labels = wanted, rows_of(wanted)
        self.generator, self.seed, self.batch_size = generator, seed, batch_size
        self.rounding, self.device = rounding, device

    def draw(self, share: Share = WHOLE, take: Take | None = None) -> bool:
        """Draw the shards of a share that are not there.

        Args:
            share: of this process.
            take: is given every picture of the share once, drawn now or before, in any order; those that are drawn now
                are handed over by a second thread while the next ones are being drawn.

        Returns:
            Whether the store is complete.
        """
        fresh: set[int] = set()
        with ThreadPoolExecutor(1, "take") as thread:
            pending = []

            def make(rows: range, advance: Advance) -> dict[str, np.ndarray]:
                parts = []
                wanted = self.wanted[rows.start : rows.stop]
                for images in generate(self.generator, wanted, self.seed, self.batch_size, self.device, rows):
                    pictures = to_uint8(images, self.rounding).cpu()
                    first = rows.start + sum(map(len, parts))
                    if take is not None:
                        pending.append(thread.submit(take, torch.arange(first, first + len(pictures)), pictures))
                        while len(pending) > 2:  # so that pictures do not pile up where taking is slower
                            pending.pop(0).result()
                    parts.append(pictures)
                    advance(len(pictures))
                fresh.update(rows)
                drawn = torch.cat(parts).permute(0, 2, 3, 1).contiguous().numpy()
                return {"image": drawn, "label": self.labels[rows.start : rows.stop].numpy()}

            if share.parts == 1:
                ensure_store(self.folder, "drawing", self._plan, make, header=self.header)
                complete = True
            else:
                complete = make_share(self.folder, "drawing", self._plan, make, share, header=self.header)
            for job in pending:
                job.result()
        if take is not None:
            for serials, pictures in self._stored(share, fresh):
                take(serials, pictures)
        return complete

    @property
    def store(self) -> ArrayStore:
        """The complete store.

        Raises:
            DamagedStore: when shards are missing.
        """
        return ArrayStore(self.folder)

    def _plan(self) -> Manifest:
        with torch.no_grad():
            (sample,) = generate(self.generator, self.wanted[:1], self.seed, 1, self.device)
        _, _, height, width = sample.shape
        arrays = {"image": ArraySpec("uint8", (height, width, 3)), "label": ArraySpec("int64", ())}
        rows = self.batch_size * max(1, SHARD // self.batch_size)
        return Manifest(len(self.labels), rows, arrays, dict(self.header))

    def _stored(self, share: Share, fresh: set[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures of the share that were there before."""
        manifest = Manifest.load(self.folder)
        for shard in range(manifest.shards):
            rows = manifest.rows_of(shard)
            if share.has(shard) and rows.start not in fresh:
                file = self.folder / manifest.files_of(shard)["image"]
                pixels = np.load(file, mmap_mode="r", allow_pickle=False)
                for start in range(0, len(rows), self.batch_size):
                    part = torch.from_numpy(np.array(pixels[start : start + self.batch_size])).permute(0, 3, 1, 2)
                    yield torch.arange(rows.start + start, rows.start + start + len(part)), part


def pictures_of(
    store: ArrayStore, batch_size: int
) -> Iterator[tuple[range, Int[Tensor, " b"], UInt8[Tensor, "b 3 h w"]]]:
    """Serial numbers, labels and pictures of a store, in order."""
    for start in range(0, len(store), batch_size):
        serials = range(start, min(start + batch_size, len(store)))
        rows = np.arange(serials.start, serials.stop)
        pixels = torch.from_numpy(store.gather("image", rows)).permute(0, 3, 1, 2)
        yield serials, torch.from_numpy(store.gather("label", rows)), pixels
