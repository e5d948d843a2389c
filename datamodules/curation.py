"""The pipeline of ``task=curate``: every picture is measured once, in sealed pieces; then the steps judge in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.cache import read, short
from datamodules.curated import Decision, names_of, whole_picture
from datamodules.encoded import UnreadableImage
from datamodules.own_store import ensure_store
from datamodules.progress import Advance
from datamodules.source import PictureSource
from datamodules.store import ArraySpec, ArrayStore, Manifest, Verify
from repalign.curation.steps import Candidates, Step
from repalign.errors import UserError

READABLE = "readable"  # the first step of every pipeline
_STAND_IN = torch.full((3, 32, 32), 127, dtype=torch.uint8)  # is measured in the place of a picture that cannot be read


@dataclass(frozen=True)
class Measuring:
    """How pictures are measured; none of it changes a number beyond the last bit.

    Attributes:
        batch: pictures per call of a network.
        workers: processes that read pictures.
        piece: pictures of a sealed piece: what a stopped run repeats at most.
        verify: pieces that are there are checked by 'hash' or 'size'.
    """

    batch: int = 32
    workers: int = 0
    piece: int = 1024
    verify: Verify = "hash"


def measured(source: PictureSource, steps: Mapping[str, Step], root: Path, how: Measuring) -> ArrayStore:
    """What the steps measure of every picture: a store with a row per picture, continued when it was stopped.

    Args:
        source: the pictures, in any order.
        steps: by name; their order and limits do not matter here.
        root: the cache; the store is ``root/<source.fingerprint>/curation-<hash>``.
        how: batches, readers, pieces.

    Raises:
        UserError: for a picture that cannot be read, unless ``data.on_corrupt`` is 'skip'.
    """
    header = {"source": source.fingerprint, "steps": {name: steps[name].fingerprint for name in sorted(steps)}}
    folder = root / source.fingerprint / f"curation-{short(repr(header))}"

    def plan() -> Manifest:
        row = _measure(steps, [_STAND_IN])
        specs = {name: ArraySpec(values.dtype.name, values.shape[1:]) for name, values in row.items()}
        specs |= {"size": ArraySpec("int32", (2,)), READABLE: ArraySpec("uint8", ())}
        return Manifest(len(source), how.piece, specs, dict(header))

    def make(rows: range, advance: Advance) -> dict[str, np.ndarray]:
        parts = []
        starts = range(rows.start, rows.stop, how.batch)
        batches = [list(range(first, min(first + how.batch, rows.stop))) for first in starts]
        for pictures in read(_Whole(source), batches, how.workers):
            shown = [_STAND_IN if picture is None else picture for picture in pictures]
            size = np.array([picture.shape[1:] for picture in shown], dtype=np.int32)
            readable = np.array([picture is not None for picture in pictures], dtype=np.uint8)
            parts.append({**_measure(steps, shown), "size": size, READABLE: readable})
            advance(len(pictures))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return ensure_store(folder, "measuring pictures", plan, make, how.verify, header)


def judged(source: PictureSource, steps: Mapping[str, Step], store: ArrayStore) -> list[Decision]:
    """The decision about every picture: the steps judge in their order, each what the ones before it left.

    Returns:
        In the order of the pictures' names, in which they are judged too.
    """
    names = names_of(source)
    by_name = sorted(range(len(names)), key=names.__getitem__)
    place = np.array(by_name, dtype=np.int64)
    found: dict[int, Decision] = {}
    for row in place[store.gather(READABLE, place) == 0].tolist():
        found[row] = Decision(names[row], READABLE, "cannot be read")
    for step_name, step in steps.items():
        left = np.array([row for row in by_name if row not in found], dtype=np.int64)
        if not len(left):
            break
        mine = [name for name in store.manifest.arrays if name.startswith(f"{step_name}/")]
        numbers = {name.partition("/")[2]: store.gather(name, left) for name in mine}
        verdict = step.judge(Candidates([names[row] for row in left], store.gather("size", left), numbers))
        for at, reason in verdict.reasons.items():
            kept = verdict.copy_of.get(at)
            found[int(left[at])] = Decision(
                names[left[at]], step_name, reason, None if kept is None else names[left[kept]]
            )
    return [found.get(row) or Decision(names[row]) for row in by_name]


def _measure(steps: Mapping[str, Step], pictures: Sequence[Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for step_name, step in steps.items():
        for name, values in step.measure(pictures).items():
            if not values.isfinite().all():
                raise UserError(f"task.steps.{step_name}: '{name}' is not finite; look for the fault in the network")
            found[f"{step_name}/{name}"] = values.numpy()
    return found


class _Whole(Dataset[Any]):
    """Batches of whole pictures, None for one that cannot be read, for reading processes."""

    def __init__(self, source: PictureSource) -> None:
        self.source = source

    def __getitems__(self, rows: Sequence[int]) -> list[Tensor | None] | UserError:
        try:
            return [self._one(row) for row in rows]
        except UserError as error:  # handed over as it is: a worker would wrap it into a traceback
            return error

    def _one(self, row: int) -> Tensor | None:
        try:
            return torch.from_numpy(whole_picture(self.source, row))
        except UnreadableImage:
            if getattr(self.source, "on_corrupt", "stop") == "stop":
                raise
            return None
