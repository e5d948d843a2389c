"""Sharing what a backbone carries between the steps of a sampler: its encoder is run at some steps only (DDT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.protocols import Field, Parametrization, Path, Randomness, Sampler
from repalign.samplers.field import ANEW
from repalign.samplers.similarity import choose_steps, read_similarity, step_similarity
from repalign.state import Output, State


class Schedule(Protocol):
    """At which evaluations of the field, counted from 0 within one run, the carry is computed anew."""

    @property
    def evaluations(self) -> int | None: ...  # of the run that it was made for; None: any
    def __call__(self, evaluation: int) -> bool: ...


class Every:
    """Anew at every ``every``-th evaluation, beginning with the first; 1 is no sharing, K saves 1 - 1/K of the encoder.

    Raises:
        UserError: when ``every`` is below 1.
    """

    evaluations = None

    def __init__(self, every: int) -> None:
        if every < 1:
            raise UserError(f"sampler.schedule.every must be at least 1, found {every}")
        self.every = every

    def __call__(self, evaluation: int) -> bool:
        return evaluation % self.every == 0


class Chosen:
    """Anew at the given evaluations; the first, 0, must be one of them.

    Raises:
        UserError: when 0 is not among them.
    """

    evaluations = None

    def __init__(self, steps: Sequence[int]) -> None:
        if 0 not in steps:
            raise UserError(f"sampler.schedule.steps: the first evaluation, 0, has nothing to share; found {steps}")
        self.steps = frozenset(steps)

    def __call__(self, evaluation: int) -> bool:
        return evaluation in self.steps


class Statistical:
    """Anew where a dynamic programme over measured similarities says so (DDT, arXiv:2504.05741).

    Args:
        similarity: file of :func:`repalign.samplers.similarity.write_similarity`, which ``task=sharing`` measures.
        rate: evaluations of the run per evaluation of the encoder; int(n / rate) of n are computed anew.

    Raises:
        UserError: when the file cannot be read, or the rate leaves no evaluation or more than there are.
    """

    def __init__(self, similarity: str, rate: float) -> None:
        measured = read_similarity(FilePath(similarity))
        self.evaluations = len(measured)
        self.steps = frozenset(choose_steps(measured, rate))

    def __call__(self, evaluation: int) -> bool:
        return evaluation in self.steps


class SharedCarry:
    """Another sampler, whose field gets its last carry back wherever the schedule does not ask for a new one.

    It works with every sampler and with every backbone that has a carry: DDT's encoder is then run at some evaluations
    only. Under guidance the carry is that of the doubled batch. An evaluation is a call of the field: one per step of
    Euler's and of multistep methods, two per step of Heun's.

    Args:
        sampler: the sampler that integrates.
        schedule: when to compute anew.

    Raises:
        UserError: at a run, when the backbone has no carry, or when the schedule was made for a run of another length.
    """

    def __init__(self, sampler: Sampler, schedule: Schedule) -> None:
        self.sampler = sampler
        self.schedule = schedule

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Sample; the carry is forgotten between runs."""
        memory = CarryMemory()
        x_0 = self.sampler(CarriedField(field, self.schedule, memory), x_1, random, trace=trace)
        expected = self.schedule.evaluations
        if expected is not None and memory.evaluations != expected:
            raise UserError(
                f"sampler.schedule: made for {expected} evaluations, but this sampler makes {memory.evaluations}; "
                "measure again with task=sharing and the same sampler"
            )
        return x_0


def shared(steps: int, sampler: Callable[..., Sampler], schedule: Schedule) -> SharedCarry:
    """:class:`SharedCarry` around a sampler that is still to be made with its number of steps (for configurations)."""
    return SharedCarry(sampler(steps=steps), schedule)


class CarrySimilarity:
    """A sampler that shares nothing and measures how alike the carries of its evaluations are.

    Call it as the sampler that it holds, as often as there are batches; every batch counts by its number of samples.

    Args:
        sampler: the sampler that is to share later on.

    Raises:
        UserError: at a run, when the backbone has no carry, or when nothing has been sampled yet.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.total: Tensor | None = None
        self.samples = 0

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Sample one batch."""
        memory = CarryMemory(history=[])
        x_0 = self.sampler(CarriedField(field, Every(1), memory), x_1, random, trace=trace)
        assert memory.history is not None
        count = len(memory.history[0])
        measured = count * step_similarity(torch.stack(memory.history))
        self.total = measured if self.total is None else self.total + measured
        self.samples += count
        return x_0

    def mean(self) -> Float[Tensor, "n n"]:
        """The similarity over all samples, under guidance over both halves of each batch."""
        if self.total is None:
            raise UserError("sampler: no sample has been drawn, so there is no similarity")
        return (self.total / self.samples).cpu()


@dataclass
class CarryMemory:
    """What a run remembers: its number of evaluations, the last carry, and all carries when ``history`` is a list."""

    evaluations: int = 0
    carry: Any = None
    history: list[Tensor] | None = None


@dataclass(frozen=True)
class CarriedField:
    """A field that sends its carry back to the backbone; itself a field.

    Raises:
        UserError: when the backbone has no carry.
    """

    field: Field
    schedule: Schedule
    memory: CarryMemory

    def __post_init__(self) -> None:
        if not self.field.uses_carry:
            raise UserError(
                "sampler: only a backbone with a carry can share it (backbone=ddt_...); choose sampler=euler"
            )

    @property
    def path(self) -> Path:
        """The path of the field."""
        return self.field.path

    @property
    def parametrization(self) -> Parametrization:
        """The parametrization of the field."""
        return self.field.parametrization

    @property
    def uses_carry(self) -> bool:
        """Whether a carry may be sent to this field: it keeps its own."""
        return False

    def during(self, t: Tensor) -> CarriedField:
        """The field of a whole step, with the same memory."""
        return replace(self, field=self.field.during(t))

    def __call__(self, x_t: State, t: Tensor, carry: Any = None) -> Output:
        """Call the field with the remembered carry, or with none where the schedule asks for a new one."""
        memory = self.memory
        anew = self.schedule(memory.evaluations)
        output = self.field(x_t, t, ANEW if anew else memory.carry)
        if anew:
            memory.carry = output.carry
            if memory.history is not None:
                memory.history.append(output.carry)
        memory.evaluations += 1
        return output
