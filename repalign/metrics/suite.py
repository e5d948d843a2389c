"""Several scores over one pass of a feature network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.metrics.features import FeatureNetwork, to_uint8
from repalign.metrics.reference import Reference


class Score(Protocol):
    """A number of the generated pictures' features, perhaps against a reference."""

    def set_reference(self, reference: Reference) -> None: ...
    def update(self, features: Tensor, logits: Tensor) -> None: ...
    def compute(self) -> tuple[float, float | None]: ...  # value, spread
    def reset(self) -> None: ...


class FeatureMetrics:
    """Scores by name over one feature network: the network runs once per picture. Keeps protocol ``Metric``.

    Pictures are rounded to bytes first, so that scoring in memory and scoring the saved files give the same numbers.

    Args:
        network: gives features and logits.
        scores: name -> score. The name says which network it is (``fd_lite0``); ``fid`` is Inception's alone.
    """

    def __init__(self, network: FeatureNetwork, scores: Mapping[str, Score]) -> None:
        self.network = network
        self.scores = dict(scores)
        self.count = 0
        self.reference: Reference | None = None
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> FeatureMetrics:
        """Move the network; sums stay on the CPU in float64."""
        self.network.to(device)
        self._device = device
        return self

    def set_reference(self, reference: Reference) -> None:
        """Compare with these statistics."""
        self.reference = reference
        for score in self.scores.values():
            score.set_reference(reference)

    def prepare(self, batches: Callable[[], Iterable[Tensor]], fingerprint: str, folder: Path) -> Reference:
        """Compare with these pictures; their statistics are measured once and kept in ``folder``.

        Args:
            batches: gives the real pictures [B, 3, H, W] in [0, 1]; called only when nothing is kept yet.
            fingerprint: of the pictures.
            folder: of the kept statistics.
        """
        identity = f"{self.network.fingerprint}/{fingerprint}"
        file = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if file.exists():
            reference = Reference.load(file)
        else:
            reference = Reference.measure(self._features, batches(), identity)
            reference.save(file)
        self.set_reference(reference)
        return reference

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.network(to_uint8(images).to(self._device).float() / 255)

    def update(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """Add generated pictures in [0, 1]."""
        features, logits = self._features(images)
        for score in self.scores.values():
            score.update(features, logits)
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """Every score by name; where it is a mean over parts, ``<name>_std`` is the deviation between them."""
        values: dict[str, float] = {}
        for name, score in self.scores.items():
            values[name], spread = score.compute()
            if spread is not None:
                values[f"{name}_std"] = spread
        return values

    def reset(self) -> None:
        """Forget the generated pictures; the reference stays."""
        self.count = 0
        for score in self.scores.values():
            score.reset()
