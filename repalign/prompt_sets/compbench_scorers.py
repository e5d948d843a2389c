"""Scorers of T2I-CompBench: attributes by questions, places by a detector, actions by CLIP, complex by all three."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from repalign.encoders.detection import Detections
from repalign.prompt_sets.compbench_rules import (
    Asked,
    objects_asked,
    objects_beside,
    on_grid,
    phrases_asked,
    place_asked,
    spatial_score,
    without_adjectives,
)
from repalign.prompt_sets.interfaces import VQA, Detector, ImageText
from repalign.prompt_sets.words import Reader, RuleReader


class CategoryScorer(Protocol):
    """Values of the pictures of one prompt."""

    @property
    def fingerprint(self) -> str: ...
    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]: ...


class AttributeScorer:
    """BLIP-VQA: the product over the prompt's noun phrases of the probability of yes to "<noun phrase>?".

    The first eight phrases count, but for "top", "the side", "the left", "the right"; a prompt without any scores 1.

    Args:
        vqa: answers.
        reader: finds noun phrases.
    """

    def __init__(self, vqa: VQA, reader: Reader) -> None:
        self.vqa, self.reader = vqa, reader

    @property
    def fingerprint(self) -> str:
        """Of the network and the reader."""
        return f"attributes-{self.reader.fingerprint}/{self.vqa.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [0, 1] for each picture."""
        values = [1.0] * len(pictures)
        for phrase in phrases_asked(self.reader(prompt)):
            answers = self.vqa(pictures, [f"{phrase}?"] * len(pictures)).tolist()
            values = [value * answer for value, answer in zip(values, answers, strict=True)]
        return values


class SpatialScorer:
    """Two objects found, and where they stand (:func:`repalign.prompt_sets.compbench_rules.spatial_score`).

    Boxes are scaled to the grid of UniDet's input (479 pixels on the shorter side, at most 480 on the longer), in which
    ``distance`` is meant. Deviation: any detector instead of UniDet, so objects that it has no name for score 0 (COCO's
    80 classes lack many of the benchmark's).

    Args:
        detector: finds objects.
        reader: finds nouns.
        threshold: that a detection's score must exceed.
        distance: pixels of that grid that count as near.
        synonyms: noun of the prompts -> label of the detector, where they differ.
    """

    def __init__(
        self,
        detector: Detector,
        reader: Reader,
        threshold: float = 0.5,
        distance: float = 150.0,
        synonyms: Mapping[str, str] | None = None,
    ) -> None:
        self.detector, self.reader = detector, reader
        self.threshold, self.distance, self.synonyms = threshold, distance, dict(synonyms or {})

    @property
    def fingerprint(self) -> str:
        """Of the network and the reader, with the threshold."""
        rules = f"{self.threshold}-{self.distance}-{self.reader.fingerprint}"
        return f"spatial-{rules}/{self.detector.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [0, 1] for each picture."""
        return self.values(place_asked(prompt), objects_asked(self.reader(prompt)), pictures)

    def values(self, place: str | None, asked: Asked | None, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [0, 1] for each picture, of two objects and where the first should stand."""
        scale = on_grid(pictures.shape[-2], pictures.shape[-1])
        if asked is not None:
            asked = self.synonyms.get(asked[0], asked[0]), self.synonyms.get(asked[1], asked[1])
        return [spatial_score(place, asked, self._sure(seen, scale), self.distance) for seen in self.detector(pictures)]

    def _sure(self, seen: Detections, scale: float) -> Detections:
        sure = (seen.scores > self.threshold).nonzero().flatten().tolist()
        return Detections(seen.boxes[sure] * scale, [seen.labels[number] for number in sure], seen.scores[sure])


class CaptionScorer:
    """The cosine of picture and prompt in CLIP (ViT-B/32 in the paper).

    Args:
        image_text: embeddings.
    """

    def __init__(self, image_text: ImageText) -> None:
        self.image_text = image_text

    @property
    def fingerprint(self) -> str:
        """Of the network."""
        return f"cosine/{self.image_text.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [-1, 1] for each picture."""
        text = self.image_text.texts([prompt])
        (seen,) = self.image_text(pictures.to(text.device).float() / 255)
        return F.cosine_similarity(seen, text).tolist()


class ThreeInOne:
    """The 3-in-1 of the category complex: the mean of what its prompts are about.

    Attributes by BLIP-VQA on the whole prompt; places of the two nouns beside a word of place
    (:func:`repalign.prompt_sets.compbench_rules.objects_beside`); actions by CLIP on the prompt without its adjectives.
    A prompt of ``complex_<split>_spatial.txt`` scores the mean of attributes and places, one of
    ``complex_<split>_action.txt`` that of attributes and actions, any other that of all three. As in the official code
    attributes are rounded to four digits, and "on top of" is no place that a box can have.

    Deviations: those of the three scorers.

    Args:
        attributes, places, actions: the scorers of the other categories.
        spatial, action: the prompts of the two files.
    """

    def __init__(
        self,
        attributes: AttributeScorer,
        places: SpatialScorer,
        actions: CaptionScorer,
        spatial: Sequence[str],
        action: Sequence[str],
    ) -> None:
        self.attributes, self.places, self.actions = attributes, places, actions
        self.spatial, self.action = ({_start(prompt) for prompt in prompts} for prompts in (spatial, action))

    @property
    def fingerprint(self) -> str:
        """Of the three scorers."""
        return f"3-in-1 of {self.attributes.fingerprint}, {self.places.fingerprint}, {self.actions.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """A mean of values in [0, 1] and cosines for each picture."""
        read, about = self.places.reader(prompt), _start(prompt)
        parts = [[round(value, 4) for value in self.attributes(prompt, pictures)]]
        if about in self.spatial or about not in self.action:
            parts.append(self.places.values(place_asked(prompt), objects_beside(read), pictures))
        if about not in self.spatial:
            parts.append(self.actions(without_adjectives(read), pictures))
        return [math.fsum(values) / len(values) for values in zip(*parts, strict=True)]


def _start(prompt: str) -> str:
    """What a prompt is known by in the lists of the category complex."""
    return prompt.split(".")[0].lower()


class CompBenchScorer:
    """The scorers of the categories, from three networks: categories without one of theirs are written alone.

    Args:
        vqa: for color, shape and texture.
        detector: for spatial.
        image_text: for non_spatial. All three are for complex.
        reader: of prompts; None: by rule. The official one is
            :class:`repalign.prompt_sets.words.SpacyReader`.
        threshold, distance, synonyms: of :class:`SpatialScorer`.
    """

    def __init__(
        self,
        vqa: VQA | None = None,
        detector: Detector | None = None,
        image_text: ImageText | None = None,
        reader: Reader | None = None,
        threshold: float = 0.5,
        distance: float = 150.0,
        synonyms: Mapping[str, str] | None = None,
    ) -> None:
        self.networks = [network for network in (vqa, detector, image_text) if network is not None]
        reader = reader or RuleReader()
        self.attributes = None if vqa is None else AttributeScorer(vqa, reader)
        self.places = None if detector is None else SpatialScorer(detector, reader, threshold, distance, synonyms)
        self.actions = None if image_text is None else CaptionScorer(image_text)

    def by_category(self, about: Callable[[str], Sequence[str]]) -> dict[str, CategoryScorer]:
        """The scorer of every category that has one.

        Args:
            about: "spatial" or "action" -> the prompts of complex about it; asked where complex can be scored.
        """
        simple = {"color": self.attributes, "shape": self.attributes, "texture": self.attributes}
        simple |= {"spatial": self.places, "non_spatial": self.actions}
        found: dict[str, CategoryScorer] = {name: scorer for name, scorer in simple.items() if scorer is not None}
        if self.attributes and self.places and self.actions:
            parts = self.attributes, self.places, self.actions
            found["complex"] = ThreeInOne(*parts, about("spatial"), about("action"))
        return found

    def to(self, device: torch.device) -> CompBenchScorer:
        """Move the networks."""
        for network in self.networks:
            network.to(device)
        return self
