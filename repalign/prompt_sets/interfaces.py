"""What the scorers of prompt sets need of networks, and what a task needs of a prompt set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repalign.encoders.detection import Detections
from repalign.prompt_sets.summary import Judged


class Detector(Protocol):
    """Finds objects. ``labels``: every name it may say; ``fingerprint`` changes with weights and preparation."""

    labels: Sequence[str]
    fingerprint: str

    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"]) -> list[Detections]: ...
    def to(self, device: torch.device) -> Detector: ...


class VQA(Protocol):
    """Answers questions about pictures: the probability of yes against no."""

    fingerprint: str

    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]: ...
    def to(self, device: torch.device) -> VQA: ...


class ImageText(Protocol):
    """Embeddings of pictures in [0, 1] and of texts in one space, not normalised."""

    fingerprint: str

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"]]: ...
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "b d"]: ...
    def to(self, device: torch.device) -> ImageText: ...


@dataclass(frozen=True)
class Layout:
    """Where the pictures of one prompt lie for the official scorer, relative to the output folder.

    Attributes:
        pictures: a file for each.
        texts: files beside them with their content.
        grid: file of all pictures side by side, or None.
    """

    pictures: list[str]
    texts: dict[str, str]
    grid: str | None = None


class PromptSet(Protocol):
    """Prompts of a benchmark, the layout that its official scorer takes, and perhaps a scorer of its own.

    ``headline`` is the name of the number over all tags, or None where the benchmark prints none.
    """

    name: str
    prompts: Sequence[str]
    per_prompt: int
    fingerprint: str
    headline: str | None

    def layout(self, place: int) -> Layout: ...
    def judge(self, place: int, pictures: UInt8[Tensor, "n 3 h w"]) -> list[Judged]: ...  # [] where no scorer fits
    def scored_by(self) -> str: ...  # the scorer, with its networks
    def to(self, device: torch.device) -> PromptSet: ...
