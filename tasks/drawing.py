"""Pictures drawn into shards: a run that is killed goes on where it was, several processes share the work."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from callbacks.pictures import Generator, generate, stages
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
        overlap: decode, round and hand over pictures in a second thread, while the sampler is at the next ones. None:
            where the generator is on an accelerator. On a CPU both want the same cores, and it does not pay
            (``experiments/evaluator``). The pictures are the same.
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
        overlap: bool | None = None,
    ) -> None:
        # Through JSON, as it will be compared with what the manifest holds.
        self.header: dict[str, Any] = {"settings": json.loads(json.dumps(settings, default=str))}
        text = json.dumps(self.header, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.wanted, self.labels = wanted, rows_of(wanted)
        self.generator, self.seed, self.batch_size = generator, seed, batch_size
        self.rounding, self.device = rounding, device
        self.overlap = device.type != "cpu" if overlap is None else overlap

    def draw(self, share: Share = WHOLE, take: Take | None = None) -> bool:
        """Draw the shards of a share that are not there.

        Args:
            share: of this process.
            take: is given every picture of the share once, drawn now or before, in any order.

        Returns:
            Whether the store is complete.
        """
        fresh: set[int] = set()
        sampled, decoded = stages(self.generator)
        with _Behind(self.overlap) as behind:

            def pictures_of_latents(latents: Any) -> Tensor:
                return to_uint8(decoded(latents), self.rounding).cpu()

            def make(rows: range, advance: Advance) -> dict[str, np.ndarray]:
                parts: list[Future[Tensor]] = []
                first, wanted = rows.start, self.wanted[rows.start : rows.stop]
                for latents in generate(sampled, wanted, self.seed, self.batch_size, self.device, rows):
                    serials = torch.arange(first, min(first + self.batch_size, rows.stop))
                    first += self.batch_size
                    parts.append(behind.run(pictures_of_latents, latents))
                    if take is not None:
                        behind.run(_hand_over, take, serials, parts[-1])
                    advance(len(serials))
                fresh.update(rows)
                drawn = torch.cat([part.result() for part in parts]).permute(0, 2, 3, 1).contiguous().numpy()
                return {"image": drawn, "label": self.labels[rows.start : rows.stop].numpy()}

            if share.parts == 1:
                ensure_store(self.folder, "drawing", self._plan, make, header=self.header)
                complete = True
            else:
                complete = make_share(self.folder, "drawing", self._plan, make, share, header=self.header)
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


def _hand_over(take: Take, serials: Tensor, pictures: Future[Tensor]) -> None:
    take(serials, pictures.result())


class _Behind:
    """Runs jobs one after another in a second thread, or at once; a few may wait, so that pictures do not pile up."""

    WAITING = 4

    def __init__(self, overlap: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "pictures") if overlap else None
        self._jobs: deque[Future[Any]] = deque()

    def run(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin a job; an error of an earlier one comes out here."""
        if self._thread is None:
            done: Future[Any] = Future()
            done.set_result(work(*arguments))
            return done
        self._jobs.append(self._thread.submit(work, *arguments))
        while len(self._jobs) > self.WAITING:
            self._jobs.popleft().result()
        return self._jobs[-1]

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for what was begun; errors of jobs come out, unless another is on its way."""
        if self._thread is None:
            return
        self._thread.shutdown(cancel_futures=kind is not None)
        for job in self._jobs if kind is None else ():
            job.result()


def pictures_of(
    store: ArrayStore, batch_size: int
) -> Iterator[tuple[range, Int[Tensor, " b"], UInt8[Tensor, "b 3 h w"]]]:
    """Serial numbers, labels and pictures of a store, in order."""
    for start in range(0, len(store), batch_size):
        serials = range(start, min(start + batch_size, len(store)))
        rows = np.arange(serials.start, serials.stop)
        pixels = torch.from_numpy(store.gather("image", rows)).permute(0, 3, 1, 2)
        yield serials, torch.from_numpy(store.gather("label", rows)), pixels
