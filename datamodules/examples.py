"""Conditions for pictures that are drawn: those of pictures of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from datamodules.source import Boxed, Segmented
from repalign.protocols import Randomness


def examples_of(data: Any, labels: Int[Tensor, " b"], random: Randomness, *, with_images: bool) -> Mapping[str, Any]:
    """What batches hold of one picture of each class: label, caption, boxes, map, picture; as far as they have them.

    The picture of a sample is drawn from its class by the stream ``example``, so that it depends on seed and serial
    number alone.

    Args:
        data: the data module.
        labels: wanted classes.
        random: of the samples to be drawn.
        with_images: whether to read the pictures.
    """
    source = data.source
    members = {label: np.flatnonzero(source.labels == label) for label in set(labels.tolist())}
    uniform = random.uniform("example").tolist()
    index = [int(members[k][int(u * len(members[k]))]) for k, u in zip(labels.tolist(), uniform, strict=True)]
    batch: dict[str, Any] = {"label": labels, "index": torch.tensor(index), "serial": torch.tensor(index)}
    if source.captions is not None:
        batch["caption"] = [source.captions[i] for i in index]
    if isinstance(source, Boxed):
        batch["boxes"] = torch.from_numpy(source.boxes(index)).to(labels.device)
    if isinstance(source, Segmented):
        batch["segmentation"] = torch.from_numpy(source.segmentation(index)).to(labels.device)
    if with_images:
        batch["image"] = torch.from_numpy(source.load(index)[0]).to(labels.device)
    return batch
