"""Training of one loss by one optimizer, with Lightning's automatic optimisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import RunModule
from lightning_modules.sharding import whole
from repalign.training.phase import MakeOptimizer, MakeScheduler


class OnePhase(RunModule):
    """Automatic optimisation of ``trained`` by one optimizer.

    Args:
        optimizer: from parameters to optimizer.
        scheduler: from optimizer to learning-rate scheduler, stepped once per optimizer step; or None.
        run: see :class:`lightning_modules.base.RunModule`.

    Attributes:
        trained: the parts that are optimised.
    """

    trained: nn.Module

    def __init__(self, *, optimizer: MakeOptimizer, scheduler: MakeScheduler | None = None, **run: Any) -> None:
        super().__init__(**run)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler

    def learned(self) -> Iterable[nn.Parameter]:
        """What is optimised."""
        return self.trained.parameters()

    def note(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's share to the terms of the step under way."""
        self.add_terms({"loss": total, **terms}, 1 / self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and keep the norm for the journal: one pass for both."""
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = whole(nn.utils.clip_grad_norm_(parameters, limit).detach())
        self.terms["train/grad_norm"] = norm
        self.hold(optimizer, norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and count; the counter is ours because Lightning's counts every optimizer."""
        super().optimizer_step(*args, **kwargs)
        self.finish_step()

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained parts, and its schedule, stepped once per optimizer step."""
        optimizer = self.make_optimizer([p for p in self.learned() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }
