"""T2I-CompBench: its files of prompts and its layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.prompt_sets.compbench_scorers import CategoryScorer, CompBenchScorer
from repalign.prompt_sets.interfaces import Layout
from repalign.prompt_sets.reading import PROMPTS, digest_of_texts, find_prompts, read_lines
from repalign.prompt_sets.summary import Judged

KEY, EXPECTED = PROMPTS["repalign.prompt_sets.compbench.CompBench"]
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
LONGEST = 255  # bytes of a file name
EACH = "a prompt on each line, as in T2I-CompBench"


class CompBench:
    """Huang et al., NeurIPS 2023 (arXiv:2307.06350): six categories, ten pictures of each prompt.

    Prompts are the lines of ``<category>_<split>.txt``; pictures lie as the official scorers take them, a folder for
    each category: ``color/samples/<prompt>_000000.png``, numbered through the category. The paper prints a number for
    each category and none over all.

    Args:
        folder: with the prompt files.
        categories: of ``CATEGORIES``, in this order.
        split: val or train.
        per_prompt: pictures of each prompt.
        scorer: None to draw and write alone.

    Raises:
        UserError: for another category, a missing file, a prompt that cannot be part of a file name, or a scorer
            without a network for any of the categories.
    """

    name = "t2i_compbench"
    headline: str | None = None

    def __init__(
        self,
        folder: str | Path | None,
        categories: Sequence[str] = CATEGORIES,
        split: str = "val",
        per_prompt: int = 10,
        scorer: CompBenchScorer | None = None,
    ) -> None:
        place = find_prompts(folder, KEY, EXPECTED)
        self.places: list[tuple[str, int]] = []
        self.prompts: list[str] = []
        for category in categories:
            if category not in CATEGORIES:
                raise unknown_choice("prompt_set.categories", category, CATEGORIES, "category")
            file = place / f"{category}_{split}.txt"
            own = read_lines(file, KEY, EACH)
            for prompt in own:
                if "/" in prompt or len(prompt.encode()) > LONGEST - len("_000000.png"):
                    raise UserError(f"{KEY}: '{prompt[:60]}' of '{file}' cannot be part of a file name; shorten it")
            self.places += [(category, number) for number in range(len(own))]
            self.prompts += own
        self.per_prompt = per_prompt
        self.scorer = scorer
        self.scorers: dict[str, CategoryScorer] = {}
        if scorer is not None:
            known = scorer.by_category(partial(_about, place, split) if "complex" in categories else lambda kind: ())
            self.scorers = {category: known[category] for category in categories if category in known}
            if not self.scorers:
                raise UserError(
                    f"prompt_set.scorer: has no network that scores {', '.join(categories)}; expected vqa for color, "
                    "shape, texture, detector for spatial, image_text for non_spatial, all three for complex"
                )
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
        if self.scorer is not None:
            self.scorer.to(device)
        return self


def _about(folder: Path, split: str, kind: str) -> list[str]:
    """The prompts of complex about places or actions."""
    return read_lines(folder / f"complex_{split}_{kind}.txt", KEY, EACH)
