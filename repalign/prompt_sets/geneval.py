"""GenEval: objects, counts, colours and positions that a prompt asks for, checked by a detector."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from repalign.errors import UserError, nearest
from repalign.prompt_sets.colours import Colours
from repalign.prompt_sets.geneval_rules import COLOURS, POSITIONS, faults, kept
from repalign.prompt_sets.interfaces import Detector, ImageText, Layout
from repalign.prompt_sets.reading import PROMPTS, digest_of_texts, read_entries
from repalign.prompt_sets.summary import Judged

KEY, EXPECTED = PROMPTS["repalign.prompt_sets.geneval.GenEval"]


class GenEvalScorer:
    """Right or wrong, by the rules of :mod:`repalign.prompt_sets.geneval_rules`.

    Args:
        detector: of COCO's classes; Mask2Former with Swin-S in the paper.
        image_text: judges colours; CLIP ViT-L/14 in the paper.
        names: label of the detector -> name in the prompts, where they differ.
        threshold: of a detection's score.
        counting_threshold: the same for the tag ``counting``.
        most: objects of a class.
        overlap: below 1, objects of a class that overlap a surer one so much are dropped; the benchmark drops none.
        margin: of relative positions.
    """

    def __init__(
        self,
        detector: Detector,
        image_text: ImageText,
        names: Mapping[str, str] | None = None,
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        most: int = 16,
        overlap: float = 1.0,
        margin: float = 0.1,
    ) -> None:
        self.detector, self.image_text = detector, image_text
        self.names = dict(names or {})
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.most, self.overlap, self.margin = most, overlap, margin
        self.colours = Colours(image_text, COLOURS)

    @property
    def fingerprint(self) -> str:
        """Networks and thresholds."""
        rules = f"{self.threshold}-{self.counting_threshold}-{self.most}-{self.overlap}-{self.margin}"
        return f"geneval-{rules}/{self.detector.fingerprint}/{self.image_text.fingerprint}"

    def check(self, classes: Sequence[str]) -> None:
        """Refuse classes that the detector never names.

        Raises:
            UserError: with the first of them.
        """
        known = {self.names.get(label, label) for label in self.detector.labels}
        if missing := sorted(set(classes) - known):
            raise UserError(
                f"prompt_set.scorer.names: the detector has no '{missing[0]}' ({len(missing)} of {len(set(classes))} "
                f"classes are missing).{nearest(missing[0], known)} Map its label to the name, or take one of COCO"
            )

    def __call__(self, asked: Mapping[str, Any], pictures: UInt8[Tensor, "n 3 h w"]) -> list[tuple[bool, list[str]]]:
        """Whether each picture is right, and what is wrong with it."""
        threshold = self.counting_threshold if asked["tag"] == "counting" else self.threshold
        results = []
        for picture, seen in zip(pictures, self.detector(pictures), strict=True):
            found = seen._replace(labels=[self.names.get(label, label) for label in seen.labels])
            objects = kept(found, threshold, self.most, self.overlap)
            colours = partial(self.colours, picture, found)
            wrong = faults(asked, objects, found.boxes.tolist(), colours, self.margin)
            results.append((not wrong, wrong))
        return results


class GenEval:
    """Ghosh et al., NeurIPS 2023 (arXiv:2310.11513): 553 prompts of six tags, four pictures each.

    A picture is right or wrong; a tag's score is the share of its right pictures, the overall score the mean over tags.
    Pictures lie as the official scorer takes them: ``00000/samples/00000.png``, ``00000/metadata.jsonl`` and
    ``00000/grid.png``, folders numbered by the lines of the file.

    Deviations of the scorer: the networks are those of ``transformers``, which differ from mmdetection's and
    OpenCLIP's in rounding and in the detector's resampling.

    Args:
        file: ``evaluation_metadata.jsonl``.
        per_prompt: pictures of each prompt.
        scorer: None to draw and write alone.

    Raises:
        UserError: when the file is missing or a line is none of GenEval's.
    """

    name = "geneval"
    headline: str | None = "geneval"

    def __init__(self, file: str | Path | None, per_prompt: int = 4, scorer: GenEvalScorer | None = None) -> None:
        self.entries = read_entries(file, KEY, EXPECTED)
        for number, entry in enumerate(self.entries, 1):
            _check(entry, f"{KEY}: line {number} of '{file}'")
        self.prompts = [entry["prompt"] for entry in self.entries]
        self.per_prompt, self.scorer = per_prompt, scorer
        self.fingerprint = f"geneval-{digest_of_texts(json.dumps(entry, sort_keys=True) for entry in self.entries)}"
        if scorer is not None:
            wishes = [wish for entry in self.entries for key in ("include", "exclude") for wish in entry.get(key, ())]
            scorer.check([wish["class"] for wish in wishes])

    def layout(self, place: int) -> Layout:
        """Where the pictures of a prompt lie."""
        folder = f"{place:05d}"
        return Layout(
            [f"{folder}/samples/{number:05d}.png" for number in range(self.per_prompt)],
            {f"{folder}/metadata.jsonl": json.dumps(self.entries[place])},
            f"{folder}/grid.png",
        )

    def judge(self, place: int, pictures: UInt8[Tensor, "n 3 h w"]) -> list[Judged]:
        """Right or wrong, with the words of the official results file."""
        assert self.scorer is not None, "asked for scores without a scorer"
        entry = self.entries[place]
        return [
            Judged(
                place,
                entry["tag"],
                float(right),
                {"correct": right, "reason": "\n".join(wrong), "metadata": json.dumps(entry)},
            )
            for right, wrong in self.scorer(entry, pictures)
        ]

    def scored_by(self) -> str:
        """Networks and thresholds."""
        assert self.scorer is not None, "asked for scores without a scorer"
        return self.scorer.fingerprint

    def to(self, device: torch.device) -> GenEval:
        """Move the networks."""
        if self.scorer is not None:
            self.scorer.detector.to(device)
            self.scorer.image_text.to(device)
        return self


def _check(entry: Mapping[str, Any], where: str) -> None:
    """Refuse a line that the rules could not read.

    Raises:
        UserError: naming the line and what it lacks.
    """
    if not (isinstance(entry.get("prompt"), str) and isinstance(entry.get("tag"), str)):
        raise UserError(f"{where} has no prompt and tag; expected {EXPECTED}")
    includes = entry.get("include", [])
    for key in ("include", "exclude"):
        for wish in entry.get(key, []):
            if not (isinstance(wish, dict) and isinstance(wish.get("class"), str) and type(wish.get("count")) is int):
                raise UserError(f"{where}: {key} without class and count; expected {EXPECTED}")
    for number, wish in enumerate(includes):
        if wish.get("color", COLOURS[0]) not in COLOURS:
            raise UserError(f"{where}: unknown color '{wish['color']}'.{nearest(str(wish['color']), COLOURS)}")
        if "position" in wish and wish["position"] not in [
            [side, other] for side in POSITIONS for other in range(number)
        ]:
            found, sides = wish["position"], ", ".join(POSITIONS)
            raise UserError(f"{where}: position {found}; expected [one of {sides}, number of an earlier entry]")
