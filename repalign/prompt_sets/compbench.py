"""T2I-CompBench: attributes by questions, places by a detector, actions by CLIP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.prompt_sets.compbench_rules import noun_phrases, spatial_score
from repalign.prompt_sets.interfaces import VQA, Detector, ImageText, Layout
from repalign.prompt_sets.reading import digest_of_texts, read_lines
from repalign.prompt_sets.summary import Judged

KEY = "prompt_set.folder"
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
LONGEST = 255  # bytes of a file name


class CategoryScorer(Protocol):
    """Values of the pictures of one prompt, of the categories that it is made for."""

    categories: Sequence[str]

    @property
    def fingerprint(self) -> str: ...
    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]: ...
    def to(self, device: torch.device) -> object: ...


class AttributeScorer:
    """BLIP-VQA: the product over the prompt's noun phrases of the probability of yes to "<noun phrase>?".

    Deviation: noun phrases by rule instead of spaCy's (:func:`repalign.prompt_sets.compbench_rules.noun_phrases`).

    Args:
        vqa: answers.
        categories: that it scores.
    """

    def __init__(self, vqa: VQA, categories: Sequence[str] = ("color", "shape", "texture")) -> None:
        self.vqa, self.categories = vqa, tuple(categories)

    @property
    def fingerprint(self) -> str:
        """Of the network."""
        return f"attributes-rules/{self.vqa.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [0, 1] for each picture."""
        answers = [
            self.vqa(pictures, [f"{phrase}?"] * len(pictures)).tolist() for phrase in noun_phrases(prompt) or [prompt]
        ]
        return [math.prod(own) for own in zip(*answers, strict=True)]

    def to(self, device: torch.device) -> object:
        """Move the network."""
        return self.vqa.to(device)


class SpatialScorer:
    """Two objects found, and where they stand (:func:`repalign.prompt_sets.compbench_rules.spatial_score`).

    Deviations: any detector instead of UniDet, so objects that it has no name for score 0 (COCO's 80 classes
    lack many of the benchmark's); nouns by rule.

    Args:
        detector: finds objects.
        threshold: of a detection's score.
        distance: pixels that count as near, in the drawn picture; UniDet's are those of its resampled input.
        categories: that it scores.
    """

    def __init__(
        self,
        detector: Detector,
        threshold: float = 0.5,
        distance: float = 150.0,
        categories: Sequence[str] = ("spatial",),
    ) -> None:
        self.detector, self.threshold, self.distance = detector, threshold, distance
        self.categories = tuple(categories)

    @property
    def fingerprint(self) -> str:
        """Of the network, with its threshold."""
        return f"spatial-{self.threshold}-{self.distance}/{self.detector.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [0, 1] for each picture."""
        values = []
        for seen in self.detector(pictures):
            sure = [number for number, score in enumerate(seen.scores.tolist()) if score >= self.threshold]
            found = seen._replace(
                boxes=seen.boxes[sure],
                labels=[seen.labels[number] for number in sure],
                scores=seen.scores[sure],
                masks=None,
            )
            values.append(spatial_score(prompt, found, self.distance))
        return values

    def to(self, device: torch.device) -> object:
        """Move the network."""
        return self.detector.to(device)


class CaptionScorer:
    """The cosine of picture and prompt in CLIP (ViT-B/32 in the paper).

    Args:
        image_text: embeddings.
        categories: that it scores.
    """

    def __init__(self, image_text: ImageText, categories: Sequence[str] = ("non_spatial",)) -> None:
        self.image_text, self.categories = image_text, tuple(categories)

    @property
    def fingerprint(self) -> str:
        """Of the network."""
        return f"cosine/{self.image_text.fingerprint}"

    def __call__(self, prompt: str, pictures: UInt8[Tensor, "n 3 h w"]) -> list[float]:
        """In [-1, 1] for each picture."""
        text = self.image_text.texts([prompt])
        (seen,) = self.image_text(pictures.to(text.device).float() / 255)
        return F.cosine_similarity(seen, text).tolist()

    def to(self, device: torch.device) -> object:
        """Move the network."""
        return self.image_text.to(device)


class CompBench:
    """Huang et al., NeurIPS 2023 (arXiv:2307.06350): six categories, ten pictures of each prompt.

    Prompts are the lines of ``<category>_<split>.txt``; pictures lie as the official scorers take them, a folder for
    each category: ``color/samples/<prompt>_000000.png``, numbered through the category. The paper prints a number for
    each category and none over all.

    Deviation: ``complex`` is drawn and written but not scored; its 3-in-1 needs a tagger of parts of speech.

    Args:
        folder: with the prompt files.
        categories: of ``CATEGORIES``, in this order.
        split: val or train.
        per_prompt: pictures of each prompt.
        scorer: name -> scorer; categories that none has are written alone. None: nothing is scored.

    Raises:
        UserError: for another category, a missing file, or a prompt that cannot be part of a file name.
    """

    name = "t2i_compbench"
    headline: str | None = None

    def __init__(
        self,
        folder: str | Path | None,
        categories: Sequence[str] = CATEGORIES,
        split: str = "val",
        per_prompt: int = 10,
        scorer: Mapping[str, CategoryScorer] | None = None,
    ) -> None:
        if folder is None:
            raise UserError(
                f"{KEY}: no folder named; expected the prompt files of T2I-CompBench, such as color_val.txt"
            )
        self.places: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        for category in categories:
            if category not in CATEGORIES:
                raise unknown_choice("prompt_set.categories", category, CATEGORIES, "category")
            file = Path(folder).expanduser() / f"{category}_{split}.txt"
            own = read_lines(file, KEY, "a prompt on each line, as in T2I-CompBench")
            for prompt in own:
                if "/" in prompt or len(prompt.encode()) > LONGEST - len("_000000.png"):
                    raise UserError(f"{KEY}: '{prompt[:60]}' of '{file}' cannot be part of a file name; shorten it")
            self.places += [(category, number) for number in range(len(own))]
            self.prompts += own
        self.per_prompt = per_prompt
        self.scorers = {category: own for own in (scorer or {}).values() for category in own.categories}
        named = [f"{category}/{prompt}" for (category, _), prompt in zip(self.places, self.prompts, strict=True)]
        self.fingerprint = f"t2i_compbench-{digest_of_texts(named)}"

    def layout(self, place: int) -> Layout:
        """Where the pictures of a prompt lie."""
        category, number = self.places[place]
        first = number * self.per_prompt
        names = [f"{self.prompts[place]}_{first + draw:06d}.png" for draw in range(self.per_prompt)]
        return Layout([f"{category}/samples/{name}" for name in names], {})

    def judge(self, place: int, pictures: UInt8[Tensor, "n 3 h w"]) -> list[Judged]:
        """A value for each picture; none where the category has no scorer."""
        category, _ = self.places[place]
        own = self.scorers.get(category)
        if own is None:
            return []
        return [Judged(place, category, value, {}) for value in own(self.prompts[place], pictures)]

    def scored_by(self) -> str:
        """Of the categories' scorers."""
        return ", ".join(f"{category}: {own.fingerprint}" for category, own in self.scorers.items())

    def to(self, device: torch.device) -> CompBench:
        """Move the networks."""
        for own in self.scorers.values():
            own.to(device)
        return self
