"""Training of several parts in turn, each with its own loss and optimizer: manual optimisation of a list of phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_modules.base import RunModule
from repalign.errors import UserError, unknown_choice
from repalign.random import SampleRandom
from repalign.state import Losses
from repalign.training.phase import Phase, only


class Joint(RunModule, ABC):
    """Rounds of phases: REPA-E (autoencoder, discriminator, denoiser), first stages (autoencoder, discriminator).

    A round is one optimizer step of every phase on the same global batch. A subclass says what the phases of a
    micro-batch share (:meth:`begin`: draws, a reconstruction) and what each of them minimises (:meth:`losses`). The
    step of a phase follows its own backward pass, so a later phase sees moved weights where it uses that part again;
    what :meth:`begin` computed is from before.

    Lightning's ``global_step`` counts the first phase's optimizer alone. Thus it equals the number of rounds, and
    ``max_steps`` means what it says with any number of phases.

    Attributes:
        mark: called with ``start``, ``shared``, the name of each phase and ``average`` when that is done; whoever
            measures puts itself there (:mod:`callbacks.phase_times`).

    Args:
        phases: by name, in their order; the first one takes part in every round. None leaves a phase of a recipe out.
        accumulate: micro-batches per round.
        run: see :class:`lightning_modules.base.RunModule`.

    Raises:
        UserError: when there is no phase, the first starts late, or a phase names a part that is not there.
    """

    def __init__(self, *, phases: Mapping[str, Phase | None], accumulate: int = 1, **run: Any) -> None:
        super().__init__(**run)
        self.automatic_optimization = False
        self.phases = {name: phase for name, phase in phases.items() if phase is not None}
        self.require(bool(self.phases), "needs at least one phase; see method.phases of the recipe")
        self.require(
            next(iter(self.phases.values())).start == 0, "the first phase takes part in every round; set its start=0"
        )
        self.accumulate = accumulate
        self.mark: Callable[[str], None] = _nothing_to_mark
        self._micro = 0

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """Every part that a phase may train or still, by name; they share no parameters."""

    @abstractmethod
    def begin(self, batch: dict[str, Any], random: SampleRandom) -> Any:
        """What the phases of this micro-batch share."""

    @abstractmethod
    def losses(self, phase: str, shared: Any) -> Losses:
        """The loss of a phase, called while that phase's parts alone ask for gradients."""

    def check_phases(self) -> None:
        """Every name in a phase is that of a part.

        Raises:
            UserError: for the first that is not.
        """
        for name, phase in self.phases.items():
            for part in (*phase.trains, *phase.evals):
                if part not in self.parts:
                    raise unknown_choice(f"method.phases.{name}", part, self.parts, "part")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One micro-batch through every phase; after the last one of a round, the steps."""
        # Layers that draw for themselves (dropout) get a state that depends on the step alone, as everything else does.
        torch.manual_seed(self.seed + int(batch["serial"][0]))
        self.mark("start")
        if self.watch is not None and any(self.progress.step == x.start for x in self.phases.values()):
            self.watch.forget()  # a phase joins, and the losses of the others with it
        shared = self.begin(batch, SampleRandom(self.seed, batch["serial"].tolist(), self.device))
        self.mark("shared")
        self._micro += 1
        ends_round = self._micro == self.accumulate
        for place, (name, phase) in enumerate(self.phases.items()):
            if self.progress.step < phase.start:
                continue
            with only(phase, self.parts):
                losses = self.losses(name, shared)
                self.manual_backward(losses.total / self.accumulate)
            self.add_terms({f"loss/{name}": losses.total, **losses.terms}, 1 / self.accumulate)
            if ends_round:
                self._step(place, name, phase)
            self.mark(name)
        if ends_round:
            self._micro = 0
            self.terms["train/loss"] = torch.stack([self.terms[f"train/loss/{n}"] for n in self.active_phases]).sum()
            self.finish_step()
            self.mark("average")

    @property
    def active_phases(self) -> list[str]:
        """The phases that take part in the round under way."""
        return [name for name, phase in self.phases.items() if self.progress.step >= phase.start]

    def _step(self, place: int, name: str, phase: Phase) -> None:
        counting = self.optimizers()
        counting = counting[place] if isinstance(counting, list) else counting
        optimizer = counting.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = float("inf") if phase.clip is None else phase.clip
        norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        self.terms[f"train/grad_norm/{name}"] = norm
        self.hold(optimizer, norm, name)
        if place == 0:
            counting.step()
        else:
            # Past Lightning's counter, see the class; precision and strategy take part all the same.
            self.trainer.strategy.optimizer_step(optimizer, _nothing)
        optimizer.zero_grad(set_to_none=True)
        schedule = self._schedules.get(name)
        if schedule is not None:
            schedule.step()

    def configure_optimizers(self) -> Any:
        """An optimizer per phase over its parts, in the order of the phases."""
        self._schedules: dict[str, Any] = {}
        configured = []
        for name, phase in self.phases.items():
            trained = [p for part in phase.trains for p in self.parts[part].parameters() if p.requires_grad]
            self.require(bool(trained), f"phase '{name}' has nothing to train ({', '.join(phase.trains) or 'no part'})")
            optimizer = phase.optimizer(trained)
            entry: dict[str, Any] = {"optimizer": optimizer}
            if phase.scheduler is not None:
                self._schedules[name] = phase.scheduler(optimizer)
                entry["lr_scheduler"] = self._schedules[name]  # Lightning saves and restores it, we step it
            configured.append(entry)
        return configured

    def on_fit_start(self) -> None:
        """Refuse what manual optimisation cannot do.

        Raises:
            UserError: for a precision that scales losses.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            raise UserError("trainer.precision: phases are clipped one by one, without loss scaling; set bf16-mixed")


def _nothing_to_mark(name: str) -> None:
    """Nobody measures."""


def _nothing() -> None:
    """The gradients are there already: nothing to do before the step."""
