"""The colour of an object, by a zero-shot classifier on its cut-out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from repalign.encoders.detection import Detections
from repalign.prompt_sets.interfaces import ImageText

GREY = 0x99  # of what is not the object
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class Colours:
    """GenEval's classifier (arXiv:2310.11513, appendix; CLIP ViT-L/14 there).

    The direction of a colour is the normalised mean of its templates' normalised embeddings; the answer is the colour
    whose direction has the largest cosine with the embedding of the cut-out. Outside the mask, where there is one, the
    picture is grey (153); then it is cut to the box, whose sides are rounded to pixels.

    Args:
        network: pictures and texts in one space.
        colours: the choices.
    """

    def __init__(self, network: ImageText, colours: Sequence[str]) -> None:
        self.network, self.colours = network, tuple(colours)
        self._directions: dict[str, Tensor] = {}

    def __call__(
        self, picture: UInt8[Tensor, "3 h w"], found: Detections, numbers: Sequence[int], name: str
    ) -> list[str]:
        """A colour for each of these detections of the class ``name``."""
        directions = self._of(name)
        answers = []
        for number in numbers:
            cut = cut_out(picture, found.boxes[number], None if found.masks is None else found.masks[number])
            (seen,) = self.network(cut[None].to(directions.device).float() / 255)
            answers.append(self.colours[int((F.normalize(seen, dim=-1) @ directions.T).argmax())])
        return answers

    def _of(self, name: str) -> Float[Tensor, "c d"]:
        if name not in self._directions:
            texts = [form.format(colour=colour, name=name) for colour in self.colours for form in TEMPLATES]
            rows = F.normalize(self.network.texts(texts), dim=-1).unflatten(0, (len(self.colours), len(TEMPLATES)))
            self._directions[name] = F.normalize(rows.mean(1), dim=-1)
        return self._directions[name]


def cut_out(picture: UInt8[Tensor, "3 h w"], box: Float[Tensor, " 4"], mask: Tensor | None) -> UInt8[Tensor, "3 y x"]:
    """The box of a picture, at least one pixel wide and high, grey outside the mask."""
    if mask is not None:
        picture = torch.where(mask.to(picture.device), picture, torch.full_like(picture, GREY))
    height, width = picture.shape[-2:]
    left, top, right, bottom = (round(float(side)) for side in box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
    return picture[:, top:bottom, left:right]
