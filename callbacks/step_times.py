"""Where the time and the operations of a training step go, of any method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repalign.performance.memory import PeakMemory
from repalign.performance.stopwatch import Stopwatch

# What of a step's time is shown, in the order of a step. An encoder's and an autoencoder's part is their forward pass.
REGIONS = ("data", "encoder", "autoencoder", "forward", "backward", "optimizer", "ema", "other")


class StepTimes(pl.Callback):
    """Measures the module's own training step, whatever it does: ``warmup`` steps, ``steps`` that count, one more.

    The regions do not overlap: ``data`` (waiting for the batch and moving it), ``encoder`` and ``autoencoder`` (their
    calls), ``forward`` (the rest of the loss), ``backward``, ``optimizer`` (with clipping and the watch), ``ema``,
    ``other``. The last step runs under PyTorch's operation counter instead of the clock; a compiled network runs
    uncompiled in it, since its kernels do not say what they compute. Operations are those that are done: with
    activation checkpointing, forward passes that are repeated count again.

    Args:
        warmup, steps: how many.
        now: another clock than that of the device, for instance processor seconds.

    Attributes:
        seconds: of each counted step by region, when the training has ended.
        flops: of one step by region.
        peak_bytes: most memory during the counted steps.
        memory: where that number is from.
    """

    def __init__(self, warmup: int = 3, steps: int = 20, now: Callable[[], float] | None = None) -> None:
        self.warmup = warmup
        self.steps = steps
        self.now = now
        self.seconds: list[dict[str, float]] = []
        self.flops: dict[str, float] = {}
        self.peak_bytes = 0
        self.memory: PeakMemory | None = None
        self._watch: Stopwatch | None = None
        self._counter: FlopCounterMode | None = None
        self._undo: list[Callable[[], Any]] = []
        self._seen = 0
        self._aside = False

    @property
    def total(self) -> int:
        """Steps that the trainer has to take."""
        return self.warmup + self.steps + 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put clocks around the parts of the step."""
        self._seen = 0
        self._watch = Stopwatch(pl_module.device, self.now)
        self._wrap(pl_module, "training_step", "forward")
        if isinstance(getattr(pl_module, "ema", None), nn.Module):
            self._wrap(pl_module.ema, "update", "ema")
        autoencoder = getattr(pl_module, "autoencoder", None)
        for method in ("encode", "decode_unclamped", "decode_quantized", "quantize"):
            if hasattr(autoencoder, method):
                self._wrap(autoencoder, method, "autoencoder")
        encoders = dict(getattr(pl_module, "encoders", {}))
        conditioner = getattr(pl_module, "conditioner", None)
        encoders |= {f"text/{name}": part for name, part in getattr(conditioner, "text_encoders", {}).items()}
        for part in encoders.values():
            if isinstance(part, nn.Module):
                self._undo += [
                    part.register_forward_pre_hook(lambda *_: self._enter("encoder")).remove,
                    part.register_forward_hook(lambda *_: self._leave(), always_call=True).remove,
                ]
        for optimizer in trainer.optimizers:
            self._undo += [
                optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer")).remove,
                optimizer.register_step_post_hook(lambda *_: self._leave()).remove,
            ]

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Inside, all time counts as ``name``, that of the encoders too: something that is no part of a step."""
        self._enter(name)
        self._aside = True
        try:
            yield
        finally:
            self._aside = False
            self._leave()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """The batch is here."""
        if self._counter is None and self._seen == self.warmup + self.steps:
            assert self._watch is not None
            self.seconds = self._watch.read()
            assert self.memory is not None, "counted steps come first"
            self.peak_bytes = self.memory.read()
            torch.compiler.set_stance("force_eager")
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
            self._watch = Stopwatch(pl_module.device, self._counter.get_total_flops, lambda a, b: b - a)
            self._watch.begin()
        self._base("other")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A micro-batch is done, or a step."""
        step = pl_module.progress.step
        if step == self._seen:
            return self._base("data")
        self._seen = step
        assert self._watch is not None
        if step == self.warmup:
            self.memory = PeakMemory(pl_module.device)
            self._watch.begin("data")
        elif step > self.warmup:
            self._watch.step()
            self._base("data")
        if self._counter is not None:
            self._end_counting()

    def on_before_backward(self, *_: Any) -> None:
        """Backward begins."""
        self._enter("backward")

    def on_after_backward(self, *_: Any) -> None:
        """Backward has ended."""
        self._leave()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the clocks away."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave everything as it was."""
        if self._counter is not None:
            self._end_counting()
        self._release()

    def _end_counting(self) -> None:
        assert self._counter is not None and self._watch is not None
        self._counter.__exit__(None, None, None)
        self._counter = None
        torch.compiler.set_stance("default")
        counted = self._watch.read()
        self.flops = {name: count for name, count in (counted[0] if counted else {}).items() if count}

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        whole = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._enter(name)
            try:
                return whole(*args, **kwargs)
            finally:
                self._leave()

        object.__setattr__(owner, method, call)  # beside the method of the class, past the registers of modules
        self._undo.append(lambda: object.__delattr__(owner, method))

    def _enter(self, name: str) -> None:
        if self._watch is not None and not self._aside:
            self._watch.enter(name)

    def _leave(self) -> None:
        if self._watch is not None and not self._aside:
            self._watch.leave()

    def _base(self, name: str) -> None:
        if self._watch is not None:
            self._watch.base(name)
