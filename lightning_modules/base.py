"""What every LightningModule of the house shares: counting, terms for the journal, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, optim

from lightning_modules.progress import Progress
from repalign.errors import UserError
from repalign.training.watch import GradientWatch, moving_buffers


class RunModule(pl.LightningModule):
    """A training that counts its own steps and keeps the numbers of the last one.

    What is registered below ``frozen`` follows the module to its device but stays out of the checkpoint.

    Attributes:
        seed: of every draw.
        progress: number of finished steps (rounds of all phases, where there are several).
        run_dir: set by whoever assembles the run.
        finished_terms: losses and gradient norms of the last finished step, on the device; the journal reads it.
        watch: refuses gradients that would spoil the weights; the guard puts it there.
        trains_autoencoder: whether the method trains the autoencoder (too): its latents may not come from a store then.
    """

    trains_autoencoder: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.progress = Progress()
        self.run_dir = Path()
        self.terms: dict[str, Tensor] = {}  # of the step under way
        self.finished_terms: dict[str, Tensor] = {}
        self.watch: GradientWatch | None = None

    def require(self, holds: bool, message: str) -> None:
        """One line of a contract: '<Method>: <what is wrong and which keys mend it>'."""
        if not holds:
            raise UserError(f"{type(self).__name__}: {message}")

    def add_terms(self, terms: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add a micro-batch's share to the terms of the step under way."""
        for name, value in terms.items():
            self.terms[f"train/{name}"] = self.terms.get(f"train/{name}", 0) + share * value.detach()

    def moving_buffers(self) -> list[Tensor]:
        """Running statistics and the like, of everything that is trained."""
        return moving_buffers(self, but=("frozen", "ema"))

    def hold(self, optimizer: optim.Optimizer, norm: Tensor, name: str = "") -> None:
        """Ask the watch, if there is one, before an optimizer steps."""
        if self.watch is not None:
            self.watch.hold(optimizer, norm, name)

    def finish_step(self) -> None:
        """Count the step and hand its terms to the journal."""
        if self.watch is not None:
            self.terms["train/skipped_steps"] = self.watch.settle(self.moving_buffers())
        self.after_step()
        self.progress.advance()
        self.finished_terms, self.terms = self.terms, {}

    def after_step(self) -> None:
        """What a method does when the weights have moved (the average follows them)."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The position in the run."""
        checkpoint["progress"] = {"step": self.progress.step}
        if self.watch is not None:
            checkpoint["progress"]["watch"] = self.watch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Back to the position in the run; the data stream begins there."""
        self.progress.step = checkpoint["progress"]["step"]
        if self.watch is not None and "watch" in checkpoint["progress"]:
            self.watch.load_state_dict(checkpoint["progress"]["watch"])
        if self._trainer is not None and self.trainer.datamodule is not None:
            self.trainer.datamodule.set_start(self.progress.step)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Trained parts and their average; frozen parts come from their own files."""
        whole = super().state_dict(*args, **kwargs)
        return {key: value for key, value in whole.items() if not key.startswith("frozen.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained parts and average.

        Raises:
            UserError: when the weights are of another architecture; the line names the first difference.
        """
        self.check_architecture({key: value.shape for key, value in state_dict.items()})
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def check_architecture(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare the weights of a checkpoint with this module's.

        Args:
            shapes: of every tensor in the checkpoint, by name.

        Raises:
            UserError: for the first difference.
        """
        own = {key: value.shape for key, value in self.state_dict().items()}
        for key in sorted(own.keys() | shapes.keys()):
            sizes = [
                "absent" if x is None else "x".join(map(str, x)) or "scalar" for x in (own.get(key), shapes.get(key))
            ]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"checkpoint of another architecture: '{key}' is {sizes[1]} in the file, {sizes[0]} in this "
                    "composition; compose the same experiment, backbone and aligners as the checkpoint's config.yaml"
                )
