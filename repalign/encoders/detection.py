"""Object detectors of ``transformers`` from local folders: boxes, or boxes with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.local_folder import load_network, load_reader
from repalign.encoders.scorer_folders import BOXES, MASKS
from repalign.errors import UserError

LEAST = 0.05  # of a score; no rule looks below


class Detections(NamedTuple):
    """Objects of one picture.

    Attributes:
        boxes: [K, 4], x1 y1 x2 y2 in pixels.
        labels: K names.
        scores: [K] in [0, 1].
        masks: [K, H, W], or None.
    """

    boxes: Float[Tensor, "k 4"]
    labels: list[str]
    scores: Float[Tensor, " k"]
    masks: Bool[Tensor, "k h w"] | None = None


class BoxDetector(Frozen):
    """DETR and its kin (``AutoModelForObjectDetection``): UInt8 [B, 3, H, W] -> :class:`Detections` without masks.

    Args:
        folder: local, in the layout of ``transformers``.
        key: of the configuration, for messages.

    Raises:
        UserError: one line when the weights are missing or hold something else.
    """

    def __init__(self, folder: str | Path | None, key: str = "detector.folder") -> None:
        super().__init__()
        self.network: Any = load_network(folder, "AutoModelForObjectDetection", key, BOXES)
        self.prepare: Any = load_reader(folder, "AutoImageProcessor", key, BOXES)
        self.names = {int(number): str(name) for number, name in self.network.config.id2label.items()}
        self.labels = sorted(set(self.names.values()))
        self.fingerprint = f"boxes-{digest(self.network, self.prepare.to_dict())}"
        self.freeze()

    @torch.no_grad()
    def forward(self, pictures: UInt8[Tensor, "b 3 h w"]) -> list[Detections]:
        """Objects above 0.05, surest first."""
        prepared = self.prepare(images=list(pictures.cpu()), return_tensors="pt").to(self.network.device)
        sizes = [tuple(pictures.shape[-2:])] * len(pictures)
        seen = self.prepare.post_process_object_detection(self.network(**prepared), LEAST, sizes)
        return [self._sorted(one) for one in seen]

    def _sorted(self, one: dict[str, Tensor]) -> Detections:
        order = one["scores"].argsort(descending=True)
        labels = [self.names[int(number)] for number in one["labels"][order]]
        return Detections(one["boxes"][order].float().cpu(), labels, one["scores"][order].float().cpu())


class InstanceDetector(Frozen):
    """Mask2Former for instances (Cheng et al., CVPR 2022, arXiv:2112.01527): boxes and masks.

    As its official code reads them: the 100 best of all (query, class) pairs; score = probability of the class times
    the mean probability inside the mask; the box is that of the mask. Masks are resampled from the network's grid to
    the picture at once, without the padded picture between.

    Args:
        folder, key: as :class:`BoxDetector`.
        most: pairs that are kept.

    Raises:
        UserError: one line when the weights are missing or hold something else.
    """

    def __init__(self, folder: str | Path | None, key: str = "detector.folder", most: int = 100) -> None:
        super().__init__()
        self.network: Any = load_network(folder, "Mask2FormerForUniversalSegmentation", key, MASKS)
        self.prepare: Any = load_reader(folder, "AutoImageProcessor", key, MASKS)
        if most < 1:
            raise UserError(f"{key}: most must be 1 or more, found {most}")
        self.most = most
        self.names = {int(number): str(name) for number, name in self.network.config.id2label.items()}
        self.labels = sorted(set(self.names.values()))
        self.fingerprint = f"masks-{most}-{digest(self.network, self.prepare.to_dict())}"
        self.freeze()

    @torch.no_grad()
    def forward(self, pictures: UInt8[Tensor, "b 3 h w"]) -> list[Detections]:
        """Objects above 0.05, surest first."""
        prepared = self.prepare(images=list(pictures.cpu()), return_tensors="pt").to(self.network.device)
        seen = self.network(**prepared)
        size = (pictures.shape[-2], pictures.shape[-1])
        pairs = zip(seen.class_queries_logits.float(), seen.masks_queries_logits.float(), strict=True)
        return [instances(logits, masks, self.names, size, self.most) for logits, masks in pairs]


def instances(
    logits: Float[Tensor, "q c"],
    masks: Float[Tensor, "q y x"],
    names: dict[int, str],
    size: tuple[int, int],
    most: int,
) -> Detections:
    """Objects of one picture from the outputs of Mask2Former.

    Args:
        logits: of each query over the classes and, last, none.
        masks: logits of each query on the network's grid.
        names: of the classes.
        size: height and width of the picture.
        most: (query, class) pairs.
    """
    chance = logits.softmax(-1)[:, :-1]
    best, place = chance.flatten().topk(min(most, chance.numel()))
    queries, classes = place // chance.shape[1], place % chance.shape[1]
    inside = F.interpolate(masks[queries][None], size=size, mode="bilinear", align_corners=False)[0]
    binary = inside > 0
    area = binary.sum((1, 2))
    scores = best * (inside.sigmoid() * binary).sum((1, 2)) / area.clamp(min=1)
    order = scores.argsort(descending=True)
    order = order[(scores[order] > LEAST) & (area[order] > 0)]
    labels = [names[int(classes[k])] for k in order]
    return Detections(boxes_of(binary[order]).cpu(), labels, scores[order].cpu(), binary[order].cpu())


def boxes_of(masks: Bool[Tensor, "k h w"]) -> Float[Tensor, "k 4"]:
    """The smallest boxes around masks that are not empty."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for axis, (low, high) in ((2, (0, 2)), (1, (1, 3))):
        line = masks.any(3 - axis)
        boxes[:, low] = line.float().argmax(1).float()
        boxes[:, high] = line.shape[1] - line.flip(1).float().argmax(1).float()
    return boxes
