"""The field that samplers integrate: a backbone bound to its path, its parametrization and a condition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.protocols import Backbone, Field, Parametrization, Path
from repalign.state import Coefficients, Cond, Output, State, leading, map_state

# In the place of a carry: there is none yet, but the one of this call will come back at a later one.
ANEW = object()


@dataclass(frozen=True)
class DenoisingField:
    """A backbone at a fixed condition (protocol ``Field``).

    State and condition are handed to the backbone in the dtype of its parameters (float32 when it has none), the time
    in float32 at least; outputs come back in the state's dtype, so that a float64 trajectory may run around a float32
    network.
    """

    backbone: Backbone
    path: Path
    parametrization: Parametrization
    cond: Cond

    @property
    def uses_carry(self) -> bool:
        """Whether the backbone returns a carry."""
        return self.backbone.uses_carry

    def during(self, t: Tensor) -> DenoisingField:
        """The field of a whole step that begins at t: nothing here depends on where a step begins."""
        return self

    def __call__(self, x_t: State, t: Float[Tensor, ""], carry: Any = None) -> Output:
        """Call the backbone at one time for the whole batch.

        Raises:
            UserError: when the condition passes over blocks of a backbone that cannot do that.
        """
        if self.cond.skip and not getattr(self.backbone, "skips_blocks", False):
            raise UserError("guidance.layers: this backbone cannot pass over blocks; choose guidance=cfg, or an MM-DiT")
        dtype, first = _parameter_dtype(self.backbone), leading(x_t)
        # Half precision has too few digits to tell neighbouring times apart.
        times = t.to(first.device, torch.promote_types(dtype, torch.float32)).expand(len(first))
        cond = self.cond.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        known = None if carry is ANEW else carry
        output = self.backbone(map_state(lambda x: x.to(dtype), x_t), times, cond, carry=known)
        if output.pred is None:
            return output

        def back(state: State) -> State:
            return map_state(lambda x: x.to(first.dtype), state)

        return replace(output, pred=back(output.pred), heads={name: back(head) for name, head in output.heads.items()})


def _parameter_dtype(backbone: Backbone) -> torch.dtype:
    if isinstance(backbone, nn.Module):
        for parameter in backbone.parameters():
            return parameter.dtype
    return torch.float32


def predict(field: Field, x_t: State, t: Float[Tensor, ""]) -> tuple[State, Coefficients]:
    """The field's prediction at a time, and the path's coefficients there."""
    pred = field(x_t, t).pred
    assert pred is not None, "a field that is sampled has a prediction"
    return pred, field.path.coefficients(t)


def velocity(field: Field, x_t: State, t: Float[Tensor, ""]) -> State:
    """The velocity dx/dt of the probability-flow ODE."""
    pred, c = predict(field, x_t, t)
    return field.parametrization.velocity(pred, x_t, c)
