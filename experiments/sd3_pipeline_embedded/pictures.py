"""The pictures of this study: drawings whole and cut, copies and faulty files planted; and the rule of preference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.openmoji import OpenMoji
from tests.curation.planted import GROUPS, KINDS, changed

SIDE = 128  # of the files, in pixels
WINDOW, SHIFT = 0.7, 0.2  # of a cut picture: side of what is seen and how far its middle is moved, in sides
RING, SHADE, SHARE = 1 / 16, 0.1, 0.02  # the rule: width of the border, what is not white, how much of it may be


def framed(images: Float[Tensor, "b 3 h w"]) -> Bool[Tensor, " b"]:
    """The rule of preference: the subject is framed, it does not touch the border.

    True where at most ``SHARE`` of the pixels of the outermost ring, ``RING`` of the side wide, are darker than white
    by more than ``SHADE`` in the mean over channels. Images lie in [0, 1].
    """
    side = images.shape[-1]
    width = max(1, round(RING * side))
    ring = torch.ones(side, side, dtype=torch.bool)
    ring[width:-width, width:-width] = False
    dark = (1 - images.mean(1)) > SHADE
    return dark[:, ring].float().mean(1) <= SHARE


def cut(image: PIL.Image.Image, angle: float) -> PIL.Image.Image:
    """A window of ``WINDOW`` sides, its middle moved by ``SHIFT`` sides towards ``angle``, enlarged to the whole."""
    side = image.width
    x, y = (side * (0.5 + SHIFT * f(angle)) for f in (np.cos, np.sin))
    half = WINDOW * side / 2
    wide = PIL.Image.new("RGB", (3 * side, 3 * side), "white")  # beyond the picture it is white
    wide.paste(image, (side, side))
    box = (side + x - half, side + y - half, side + x + half, side + y + half)
    return wide.resize((side, side), PIL.Image.Resampling.BICUBIC, box=box)


def write(root: Path, cache: Path, copies: int = 20, faulty: int = 20) -> dict[str, str]:
    """Write the folder, once; returns name -> what it is: ``whole``, ``cut`` or one of the planted kinds.

    Of every drawing a whole and a cut picture with its name as the caption; ``copies`` each of the same file, half the
    side, JPEG and mirrored, of different whole pictures; ``faulty`` each of tiny ones (a quarter of the side) and
    blurred ones (radius 12 pixels).
    """
    told = root.parent / "kinds.json"
    if told.is_file():
        return json.loads(told.read_text())
    drawings = OpenMoji(SIDE, cache, GROUPS)
    captions = list(drawings.captions or ())
    random = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str]] = []
    kinds: dict[str, str] = {}

    def put(image: PIL.Image.Image, kind: str, index: int, ending: str = "png") -> None:
        name = f"{drawings.name(index)}_{kind}.{ending}"
        image.save(root / name, quality=40)  # PNG has none
        lines.append({"file_name": name, "text": captions[index]})
        kinds[name] = kind

    for place, index in enumerate(random.permutation(len(drawings)).tolist()):
        image = PIL.Image.fromarray(drawings.load([index])[0][0].transpose(1, 2, 0))
        put(image, "whole", index)
        put(cut(image, random.uniform(0, 2 * np.pi)), "cut", index)
        if place < copies * len(KINDS):
            kind = KINDS[place % len(KINDS)]
            put(changed(image, kind), kind, index, "jpg" if kind == "recompressed" else "png")
        elif place < copies * len(KINDS) + faulty:
            put(image.resize((SIDE // 4, SIDE // 4)), "tiny", index)
        elif place < copies * len(KINDS) + 2 * faulty:
            put(image.filter(PIL.ImageFilter.GaussianBlur(12)), "blurred", index)
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told.write_text(json.dumps(kinds))
    return kinds
