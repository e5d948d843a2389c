"""Inception score."""

from __future__ import annotations

import torch

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference


class InceptionScore:
    """exp(E_x KL(p(y|x) || p(y))), Salimans et al., NeurIPS 2016, arXiv:1606.03498; higher is better.

    Mean and standard deviation over ``splits`` parts of a random order that has a seed of its own. In float64.

    Args:
        splits: number of parts. The ADM evaluator has 10 parts of 5,000 pictures.
        seed: of the order.

    Raises:
        UserError: for fewer than two parts.
    """

    needs = frozenset({"logits"})
    needs_reference: frozenset[str] = frozenset()

    def __init__(self, splits: int = 10, seed: int = 0) -> None:
        if splits < 2:
            raise UserError(f"metric: an inception score needs splits of at least 2, found {splits}")
        self.splits, self.seed = splits, seed

    def __call__(self, drawn: Drawn, reference: Reference | None = None) -> tuple[float, float]:
        """Mean and standard deviation (divisor splits - 1) over the parts.

        Raises:
            UserError: when a part would have fewer than one picture.
        """
        if drawn.count < self.splits:
            raise UserError(
                f"num_samples: an inception score of {self.splits} splits needs as many, found {drawn.count}"
            )
        logits = drawn.rows("logits").double()
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(self.seed))
        values = []
        for part in logits[order].log_softmax(1).tensor_split(self.splits):
            marginal = part.exp().mean(0).log()
            values.append((part.exp() * (part - marginal)).sum(1).mean().exp())
        found = torch.stack(values)
        return float(found.mean()), float(found.std())
