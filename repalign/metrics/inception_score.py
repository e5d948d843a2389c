"""Inception score."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.inception import InceptionScore as TorchInceptionScore

from repalign.errors import UserError
from repalign.metrics.features import Given
from repalign.metrics.reference import Reference


class InceptionScore:
    """exp(E_x KL(p(y|x) || p(y))), Salimans et al., NeurIPS 2016, arXiv:1606.03498; higher is better.

    Mean and standard deviation over ``splits`` random parts by torchmetrics, whose draw is given a seed of its own.

    Args:
        splits: number of parts, at least 2.
        seed: of the division into parts.

    Raises:
        UserError: for fewer than two parts.
    """

    def __init__(self, splits: int = 10, seed: int = 0) -> None:
        if splits < 2:
            raise UserError(f"metric: an inception score needs splits of at least 2, found {splits}")
        self.splits, self.seed = splits, seed
        self._logits: list[Tensor] = []

    def set_reference(self, reference: Reference) -> None:
        """The score looks at generated pictures alone."""

    def update(self, features: Float[Tensor, "b d"], logits: Float[Tensor, "b k"]) -> None:
        """Add generated pictures."""
        self._logits.append(logits.detach().cpu().double())

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts.

        Raises:
            UserError: when a part would have fewer than one picture.
        """
        count = sum(map(len, self._logits))
        if count < self.splits:
            raise UserError(f"num_samples: an inception score of {self.splits} splits needs as many, found {count}")
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all")
            torch.manual_seed(self.seed)
            logits = torch.cat(self._logits)
            score = TorchInceptionScore(Given(logits.shape[1]), splits=self.splits, sync_on_compute=False)
            score.update(logits)
            mean, deviation = score.compute()
        return float(mean), float(deviation)

    def reset(self) -> None:
        """Forget the generated pictures."""
        self._logits = []
