"""Random pictures in a folder with captions, copies among them, and steps that need no weights."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from datamodules.captioned import CaptionedFolder
from datamodules.curation import Measuring, judged, measured
from repalign.curation.duplicates import NearDuplicates
from repalign.curation.quality import QualityLimits
from repalign.curation.steps import SizeLimits
from tests.curation.planted import changed


class Pixels:
    """The picture itself at 16 px, minus its mean, is the embedding."""

    fingerprint = "pixels"

    def __call__(self, images):
        small = torch.nn.functional.interpolate(images, size=(16, 16), mode="area").flatten(1)
        return (small - small.mean(1, keepdim=True),)


class Slow(QualityLimits):
    """So that there is a moment to be killed at."""

    def measure(self, pictures):
        time.sleep(0.2)
        return super().measure(pictures)


def blobs(seed: int, width: int = 64, height: int = 64) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), PIL.Image.Resampling.BICUBIC)


def write_folder(root: Path, order=range(28)) -> Path:
    """20 pictures; an exact, a smaller, a JPEG and a mirrored copy; a flat, a tiny, a long one, and one torn file."""
    root.mkdir(parents=True)
    for number in range(20):
        blobs(number).save(root / f"a{number:02d}.png")
    for number, kind in enumerate(("exact", "resized", "recompressed", "flipped")):
        name = f"b_{kind}." + ("jpg" if kind == "recompressed" else "png")
        changed(blobs(number), kind).save(root / name, quality=40)
    PIL.Image.new("RGB", (64, 64), "grey").save(root / "c_flat.png")
    blobs(90, 20, 20).save(root / "c_tiny.png")
    blobs(91, 256, 40).save(root / "c_long.png")
    (root / "c_torn.png").write_bytes(b"no picture")
    names = sorted(path.name for path in root.iterdir())
    lines = [json.dumps({"file_name": names[i], "text": f"caption of {names[i]}"}) + "\n" for i in order]
    (root / "metadata.jsonl").write_text("".join(lines))
    return root


def steps(threshold: float = 0.95, clusters: int | None = None, quality=QualityLimits) -> dict:
    return {
        "size": SizeLimits(24, 3.0),
        "quality": quality(contrast=0.02, entropy=0.5),
        "near_duplicates": NearDuplicates(Pixels(), threshold, 64, clusters, "cpu"),
    }


def curated(root: Path, cache: Path, made=None, **how):
    made = steps() if made is None else made
    source = CaptionedFolder(root, 32, "skip", True, cache)
    return judged(source, made, measured(source, made, cache, Measuring(**{"batch": 4, "piece": 4, **how})))


if __name__ == "__main__":
    from datamodules.curated import write_decisions

    folder, cache, output = map(Path, sys.argv[1:])
    write_decisions(output, curated(folder, cache, steps(quality=Slow)), {})
