"""OpenMoji drawings in a folder, copies planted among them: python -m tests.curation.planted FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image

from datamodules.openmoji import OpenMoji

KINDS = ("exact", "resized", "recompressed", "flipped")
GROUPS = ["Food & Drink", "Smileys & Emotion"]


def plant(root: Path, cache: Path, pictures: int | None = None, each: int = 20, side: int = 128) -> dict[str, str]:
    """Write pictures and copies; returns name of a copy -> name of its original.

    ``each`` copies of four kinds, of different originals: the same file, half the side, JPEG at quality 40, mirrored.
    """
    drawings = OpenMoji(side, cache, GROUPS)
    order = np.random.default_rng(0).permutation(len(drawings))[:pictures]
    root.mkdir(parents=True)
    lines, planted = [], {}
    for place, index in enumerate(order.tolist()):
        name = f"{drawings.name(index)}.png"
        image = PIL.Image.fromarray(drawings.load([index])[0][0].transpose(1, 2, 0))
        image.save(root / name)
        lines.append({"file_name": name, "text": drawings.captions[index]})
        if place < each * len(KINDS):
            kind = KINDS[place % len(KINDS)]
            copy = f"z_{kind}_{drawings.name(index)}." + ("jpg" if kind == "recompressed" else "png")
            changed(image, kind).save(root / copy, quality=40)
            lines.append({"file_name": copy, "text": drawings.captions[index]})
            planted[copy] = name
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return planted


def changed(image: PIL.Image.Image, kind: str) -> PIL.Image.Image:
    """A copy; what saving does to it comes later."""
    if kind == "resized":
        return image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BICUBIC)
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if kind == "flipped" else image


def counted(planted: dict[str, str], lines: list[dict]) -> dict[str, dict[str, int]]:
    """Per kind: planted, found, missed; and pairs that nobody planted.

    Found: of copy and original one is removed as a near duplicate (a relative of both may be what is kept).
    """
    removed = {line["name"] for line in lines if line["step"] == "near_duplicates"}
    told = {kind: {"planted": 0, "found": 0, "missed": 0} for kind in KINDS}
    explained = set()
    for copy, original in planted.items():
        row = told[copy.split("_")[1]]
        gone = {copy, original} & removed
        row["planted"] += 1
        row["found" if gone else "missed"] += 1
        explained |= set(sorted(gone)[-1:])  # one of the two is one too many; the other is a relative of a third
    return told | {"false": {"removed": len(removed - explained)}}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    copies = plant(folder / "pictures", folder / "cache", each=40)
    (folder / "planted.json").write_text(json.dumps(copies))
    print(f"{len(copies)} copies in {folder / 'pictures'}")
