"""What a training has cost so far: it goes on counting where a killed run is resumed."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from repalign.errors import unknown_choice
from repalign.performance.operations import CountOperations

WHEN = ("eager", "always", "never")


class Work:
    """Seconds, device hours and operations of the steps that lie behind the weights.

    Previews, scores and the set-up are left out, and so is what a killed process did after its last checkpoint: the
    resumed run does those steps again. The operations of a step are counted once for all steps with the same phases,
    on one rank; they are those that are done, frozen networks and repeated forward passes included.

    Args:
        flops: when operations are counted: ``eager`` unless a network is compiled, ``always`` (a compiled network
            runs uncompiled in the counted step and takes that much memory), ``never``.

    Attributes:
        seconds: wall time.
        device_seconds: wall time of all GPUs; on a CPU the processes' CPU time, that of loaders left out.
        flops: operations of all ranks; None when a step was not counted.

    Raises:
        UserError: for another value of ``flops``.
    """

    def __init__(self, flops: str = "eager") -> None:
        if flops not in WHEN:
            raise unknown_choice("callbacks.journal.flops", flops, WHEN)
        self.when = flops
        self.seconds = 0.0
        self.device_seconds = 0.0
        self.flops: float | None = 0.0
        self._steps = 0  # that are counted in
        self._per_step: dict[str, int] = {}  # operations, by the phases that take part
        self._phases = ""
        self._mark: tuple[float, float] | None = None
        self._counter: CountOperations | None = None

    def begin(self, module: LightningModule) -> None:
        """A batch is here: look at the clock, and count the step if it is the first of its kind."""
        if self._mark is None:
            self._mark = _now()
        self._phases = " ".join(getattr(module, "active_phases", ()))
        if self._counter is None and self._phases not in self._per_step and self._may_count(module):
            self._counter = CountOperations()
            self._counter.__enter__()

    def end(self, module: LightningModule, ranks: int, step_done: bool) -> None:
        """A batch is done, and with ``step_done`` the whole step."""
        now = _now()
        if self._mark is not None:
            wall, cpu = now[0] - self._mark[0], now[1] - self._mark[1]
            self.seconds += wall
            self.device_seconds += ranks * (wall if module.device.type == "cuda" else cpu)
        self._mark = now
        if step_done:
            if self._counter is not None:
                self._per_step[self._phases] = self._counter.total
                self.stop_counting()
            counted = self._per_step.get(self._phases)
            self.flops = None if counted is None or self.flops is None else self.flops + ranks * counted
            self._steps += 1

    def pause(self) -> None:
        """Leave out what happens until the next step."""
        self._mark = None

    def stop_counting(self) -> None:
        """When a step ends or breaks."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None

    def numbers(self, step: int) -> dict[str, float]:
        """``seconds``, ``device_hours`` and, where it is known, ``flops``; none when steps before this run are missing.

        Args:
            step: of the training.
        """
        if step != self._steps:
            return {}
        known = {"seconds": self.seconds, "device_hours": self.device_seconds / 3600}
        return known if self.flops is None else known | {"flops": self.flops}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        own = {"seconds": self.seconds, "device_seconds": self.device_seconds, "flops": self.flops}
        return own | {"steps": self._steps, "per_step": dict(self._per_step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.seconds, self.device_seconds = state["seconds"], state["device_seconds"]
        self.flops, self._steps, self._per_step = state["flops"], state["steps"], dict(state["per_step"])

    def _may_count(self, module: LightningModule) -> bool:
        return self.when == "always" or (self.when == "eager" and not compiled(module))


def compiled(module: nn.Module) -> bool:
    """Whether a part of a module was compiled (:mod:`repalign.training.policies`)."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
