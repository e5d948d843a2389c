"""What a sampler's field believed the data to be, call by call: the frames of a denoising strip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from repalign.protocols import Field, Guidance, Parametrization, Path
from repalign.state import Cond, Output, State, map_state


class Recorded:
    """A guidance that also keeps the estimates of x_0 along one trajectory; the pictures stay the same bit for bit.

    At every call of the guided field at x_t it keeps x_0(x_t, t), as the parametrization says, of the first sample of
    the first batch: ``times`` [K], ``estimates`` K states with a batch of 1, in the order of the calls. Any sampler
    and any guidance can be watched, because both meet in the field alone.

    Args:
        guidance: the one that is watched.
        watch: told of the time of every call, of every batch.
    """

    def __init__(self, guidance: Guidance, watch: Callable[[float], object] | None = None) -> None:
        self.guidance = guidance
        self.watch = watch
        self.times: list[float] = []
        self.estimates: list[State] = []

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        """The guided field, watched."""
        return RecordedField(self.guidance(bind, cond, null), self, keep=not self.times)


@dataclass(frozen=True)
class RecordedField:
    """A field that hands on what its inner field says, and keeps it in the record; see :class:`Recorded`."""

    field: Field
    record: Recorded
    keep: bool

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
        """Whether the backbone returns a carry."""
        return self.field.uses_carry

    def during(self, t: Float[Tensor, ""]) -> RecordedField:
        """The watched field of a whole step that begins at t."""
        return replace(self, field=self.field.during(t))

    def __call__(self, x_t: State, t: Float[Tensor, ""], carry: Any = None) -> Output:
        """The inner field's output, untouched."""
        output = self.field(x_t, t, carry)
        if self.record.watch is not None:
            self.record.watch(float(t))
        if self.keep and output.pred is not None:
            estimate = self.parametrization.data(output.pred, x_t, self.path.coefficients(t))
            self.record.times.append(float(t))
            self.record.estimates.append(map_state(lambda x: x[:1].clone(), estimate))
        return output
