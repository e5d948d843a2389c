"""Whether the pictures and stores of a composition are what a training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from datamodules.store import MANIFEST, ArrayStore, Verify, damages
from repalign.errors import UserError
from tasks.findings import FINE, LOOK, WRONG, Finding
from tasks.instantiate import build

ROWS = 64  # of an array that are looked at
UNEQUAL = 20  # times as many pictures in the largest class as in the smallest


def checks(cfg: DictConfig) -> list[Callable[[], Iterator[Finding]]]:
    """The checks of a composition's data, which are opened once."""
    try:
        data: Any = build(cfg.data, "data")
        data.setup("fit")
    except UserError as error:
        closed = Finding("pictures", WRONG, str(error), "see data")
        return [lambda: iter([closed])]
    return [lambda: pictures(data), lambda: stores(data, cfg.data.get("root"), cfg.task.verify)]


def pictures(data: Any) -> Iterator[Finding]:
    """They can be read; classes and captions are there."""
    count = len(data.dataset)
    yield Finding("pictures", FINE, f"{count:,} of {data.num_classes} classes: {data.fingerprint}")
    if count < data.batch_size:
        yield Finding(
            "batch", LOOK, f"a batch of {data.batch_size} holds every picture more than once", "see data.batch_size"
        )
    source = data.source
    if data.num_classes > 1 and len(source.labels):
        yield from _classes(source.labels, data.num_classes, list(data.class_names))
    if data.captions is not None:
        empty = [i for i, text in enumerate(_first(data.captions, 10_000)) if not str(text).strip()]
        found = f"{len(empty)} of the first {min(count, 10_000):,} are empty"
        yield Finding("captions", LOOK if empty else FINE, found, "filter them, or give another data.caption")
    if source.has_images:
        try:
            images = source.load(sorted({0, count // 3, 2 * count // 3, count - 1}))[0]
        except UserError as error:
            yield Finding("a look at pictures", WRONG, str(error), "mend or replace the file")
            return
        flat = [i for i, image in enumerate(images) if image.min() == image.max()]
        found = f"{len(images)} read, {images.shape[-2]} x {images.shape[-1]}, values {images.min()} to {images.max()}"
        state = LOOK if len(flat) == len(images) else FINE
        yield Finding("a look at pictures", state, found, "every one of them has a single colour")


def _classes(labels: Any, classes: int, names: list[str]) -> Iterator[Finding]:
    counts = np.bincount(np.asarray(labels)[np.asarray(labels) >= 0], minlength=classes)
    empty = [names[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        yield Finding("classes", WRONG, f"{len(empty)} without a picture: {', '.join(empty[:5])}", "see data.root")
    else:
        found = f"{counts.min()} to {counts.max()} pictures each"
        unequal = counts.max() > UNEQUAL * counts.min()
        yield Finding(
            "classes", LOOK if unequal else FINE, found, "scores by class-balanced labels will favour the rare"
        )


def _first(texts: Any, count: int) -> list[Any]:
    return [texts[i] for i in range(min(count, len(texts)))]


def stores(data: Any, root: str | None, verify: Verify) -> Iterator[Finding]:
    """Stores of these pictures: files as their manifests say, values finite and not all the same."""
    # Where stores are what the data set consists of, they lie in its own folder.
    place = data.cache_root / data.fingerprint if data.computes else Path(str(root)).expanduser()
    folders = {file.parent for file in place.glob(f"**/{MANIFEST}")}
    whole, rows = 0, 0
    for folder in sorted(folders):
        name = f"store {folder.name}"
        try:
            store = ArrayStore(folder)
            broken = damages(folder, store.manifest, verify)
        except UserError as error:
            yield Finding(name, WRONG, str(error), f"remove '{folder}': it is made again")
            continue
        if broken:
            line = next(iter(broken.values()))
            yield Finding(
                name, WRONG, f"{len(broken)} of {len(store.manifest.files)} files are damaged: {line}",
                f"copy them again, or remove '{folder}': it is made again",
            )  # fmt: skip
            continue
        whole, rows = whole + 1, rows + len(store)
        yield from _values(name, store)
    made = "; made by the first training, or by task=precompute" if not folders else f", {rows:,} rows ({verify})"
    yield Finding("stores", FINE, f"{whole} of {len(folders)} whole{made}")


def _values(name: str, store: ArrayStore) -> Iterator[Finding]:
    rows = np.unique(np.linspace(0, len(store) - 1, min(ROWS, len(store))).astype(int))
    for array in store.arrays:
        if not array.startswith(("moments", "features/", "text/")):
            continue
        values = store.gather(array, rows).astype(np.float32)
        deviation = float(values.std(0).mean())
        if not np.isfinite(values).all():
            yield Finding(f"{name}, {array}", WRONG, "values that are not finite", "remove the store: it is made again")
        elif len(rows) > 1 and not deviation > 1e-4 * float(np.abs(values).mean() + 1e-12):
            yield Finding(
                f"{name}, {array}", WRONG, f"the same in {len(rows)} rows: the network that made it is dead",
                "see its weights, remove the store: it is made again",
            )  # fmt: skip
