"""What ``task=curate`` decided about a set of pictures, and the set without what it removed (``data.keep``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.cache import short
from datamodules.captions import CaptionedSource, Sets
from datamodules.encoded import EncodedPictures
from datamodules.files import sha256_of
from datamodules.source import Boxed, Named, PictureSource, Segmented
from datamodules.store import MANIFEST
from datamodules.texts import SomeTexts
from repalign.errors import UserError
from repalign.folders import write_text

PICTURES = "pictures.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Decision:
    """About one picture.

    Attributes:
        name: of the picture, the same wherever the data set lies.
        step: that removed it; None when it is kept.
        reason: in words.
        copy_of: name of the picture that stays in its stead.
    """

    name: str
    step: str | None = None
    reason: str | None = None
    copy_of: str | None = None


def write_decisions(folder: Path, decisions: Sequence[Decision], info: Mapping[str, Any]) -> None:
    """Write ``pictures.jsonl``, a line per picture in the order of their names, then ``manifest.json`` with its hash.

    The manifest comes last: one that is there speaks of a list that is whole.
    """
    lines = []
    for one in sorted(decisions, key=lambda decision: decision.name):
        told = {"name": one.name, "kept": one.step is None, "step": one.step, "reason": one.reason}
        lines.append(json.dumps({**told, "copy_of": one.copy_of}, ensure_ascii=False))
    write_text(folder / PICTURES, "".join(f"{line}\n" for line in lines))
    content = {"format": FORMAT, "pictures": len(decisions), "kept": sum(one.step is None for one in decisions)}
    content |= {**info, "sha256": sha256_of(folder / PICTURES)}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_text(folder / MANIFEST, text)


def read_decisions(path: Path) -> list[Decision]:
    """The list of a folder that ``task=curate`` wrote, in the order of the names.

    Args:
        path: of the folder, or of its ``manifest.json``.

    Raises:
        UserError: when it is missing, torn or another file.
    """
    folder = path.parent if path.name == MANIFEST else path
    mend = "give the folder that task=curate wrote (task.output), or run it again: it goes on where it was"
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data.keep: no {MANIFEST} in '{folder}'; {mend}")
    try:
        held = json.loads((folder / MANIFEST).read_bytes())
        if held["format"] != FORMAT or held["sha256"] != sha256_of(folder / PICTURES):
            raise UserError(f"data.keep: '{folder / PICTURES}' is not the list that its {MANIFEST} tells of; {mend}")
        found = [json.loads(line) for line in (folder / PICTURES).read_text(encoding="utf-8").splitlines()]
        return [Decision(one["name"], one["step"], one["reason"], one["copy_of"]) for one in found]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"data.keep: '{folder}' holds no decisions of task=curate ({error!r}); {mend}") from error


def names_of(source: PictureSource) -> list[str]:
    """The name of every picture.

    Raises:
        UserError: when the set names none, or two alike.
    """
    if not isinstance(source, Named):
        raise UserError(f"data: pictures of {source.fingerprint} have no names, so they cannot be curated")
    names = [source.name(index) for index in range(len(source))]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(sorted(names)[1:]) if name == sorted(names)[place])
        raise UserError(f"data.root: '{twice}' is listed twice; list every picture once")
    return names


def kept_of(source: Any, keep: str | Path | None) -> Any:
    """The pictures that a curation kept; the source itself when none is named.

    Raises:
        UserError: when the list is of other pictures, keeps none, or the set has more than pictures and captions.
    """
    if keep is None:
        return source
    if isinstance(source, (Boxed, Segmented)):
        raise UserError("data.keep: sets with boxes or segmentation cannot leave pictures out; set data.keep=null")
    decisions = {one.name: one for one in read_decisions(Path(keep).expanduser())}
    names = names_of(source)
    if unknown := [name for name in names if name not in decisions]:
        raise UserError(
            f"data.keep: '{keep}' is a list of {len(decisions)} pictures and does not know {len(unknown)} of the "
            f"{len(names)} here, such as {unknown[0]}; curate these data, or set data.root to those it was made of"
        )
    rows = np.array([row for row, name in enumerate(names) if decisions[name].step is None], dtype=np.int64)
    if not len(rows):
        raise UserError(
            f"data.keep: '{keep}' keeps none of the {len(names)} pictures; loosen the limits of task=curate"
        )
    kind = KeptEncoded if isinstance(source, EncodedPictures) else KeptPictures
    return kind(source, rows)


class _Kept:
    """What both kinds of a thinned set share.

    Args:
        source: all pictures.
        rows: those that are kept, ascending.
    """

    def __init__(self, source: Any, rows: np.ndarray) -> None:
        self._source = source
        self._rows = rows
        self.image_size: int = source.image_size
        self.labels: np.ndarray = source.labels[rows]
        self.class_names: Sequence[str] = source.class_names
        self.captions: Sequence[str] | None = None if source.captions is None else SomeTexts(source.captions, rows)
        self.attribution: str | None = source.attribution
        digest = short(" ".join(map(str, rows.tolist())))
        self._fingerprint = f"{source.fingerprint}-kept-{digest}"

    @property
    def fingerprint(self) -> str:
        """That of all pictures, and a hash over which are kept."""
        return self._fingerprint

    def name(self, index: int) -> str:
        """The name of a picture among all."""
        return self._source.name(int(self._rows[index]))


class KeptPictures(_Kept):
    """Some pictures of a set that draws or stores them."""

    has_images = True

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their indices."""
        wanted = np.asarray(indices, dtype=np.int64)
        return self._source.load(self._rows[wanted])[0], wanted


class KeptEncoded(_Kept, EncodedPictures):
    """Some pictures of a set of encoded ones, captions included; a damaged one is replaced by the next that is kept."""

    def __init__(self, source: EncodedPictures, rows: np.ndarray) -> None:
        EncodedPictures.__init__(self, source.image_size, source.on_corrupt, source.upscale)
        _Kept.__init__(self, source, rows)

    def place(self, index: int) -> str:
        """Where a picture lies."""
        return self._source.place(int(self._rows[index]))

    def read(self, index: int) -> bytes:
        """The bytes of a picture."""
        return self._source.read(int(self._rows[index]))

    @property
    def caption_options(self) -> str:
        """As of all pictures."""
        captioned: CaptionedSource = self._source
        return captioned.caption_options

    def caption_sets(self, index: int) -> Sets:
        """The original and the synthetic captions of a picture."""
        captioned: CaptionedSource = self._source
        return captioned.caption_sets(int(self._rows[index]))


def whole_picture(source: PictureSource, index: int) -> np.ndarray:
    """A picture as it is, uint8 [3, H, W]: not cut, not resampled, where the set has it so."""
    if isinstance(source, EncodedPictures):
        return source.whole(index)
    return source.load([index])[0][0]
