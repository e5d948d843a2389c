"""What every LightningModule with one optimizer shares: counting, terms for the journal, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_modules.progress import Progress
from repalign.errors import UserError

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class OnePhase(pl.LightningModule):
    """Automatic optimisation of ``trained`` by one optimizer.

    Attributes:
        trained: the parts that are optimised.
        progress: number of finished steps.
        run_dir: set by whoever assembles the run.
        finished_terms: losses and gradient norm of the last finished step, on the device; the journal reads it.
    """

    trained: nn.Module

    def __init__(self, optimizer: MakeOptimizer, scheduler: MakeScheduler | None, seed: int) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.seed = seed
        self.progress = Progress()
        self.run_dir = Path()
        self.terms: dict[str, Tensor] = {}  # of the optimizer step under way
        self.finished_terms: dict[str, Tensor] = {}

    def require(self, holds: bool, message: str) -> None:
        """One line of a contract: '<Method>: <what is wrong and which keys mend it>'."""
        if not holds:
            raise UserError(f"{type(self).__name__}: {message}")

    def note(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's share to the terms of the step under way."""
        share = 1 / self.trainer.accumulate_grad_batches
        for name, value in {"loss": total, **terms}.items():
            self.terms[f"train/{name}"] = self.terms.get(f"train/{name}", 0) + share * value.detach()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm and keep the norm for the journal: one pass for both."""
        limit = float("inf") if gradient_clip_val is None else float(gradient_clip_val)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.terms["train/grad_norm"] = nn.utils.clip_grad_norm_(parameters, limit).detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and count; the counter is ours because Lightning's counts every optimizer."""
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        self.progress.advance()
        self.finished_terms, self.terms = self.terms, {}

    def after_step(self) -> None:
        """What a method does when the weights have moved (the average follows them)."""

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained parts, and its schedule, stepped once per optimizer step."""
        optimizer = self.make_optimizer([p for p in self.trained.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The position in the run."""
        checkpoint["progress"] = {"step": self.progress.step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Back to the position in the run; the data stream begins there."""
        self.progress.step = checkpoint["progress"]["step"]
        if self._trainer is not None and self.trainer.datamodule is not None:
            self.trainer.datamodule.set_start(self.progress.step)
