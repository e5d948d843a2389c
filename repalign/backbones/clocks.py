"""Wrappers that hand a network the time it was made for; the house's own time has t = 0 data and t = 1 noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from repalign.protocols import Backbone
from repalign.state import Cond, Output, State, TokenSpec


def native(backbone: Backbone) -> Backbone:
    """A network whose time is the house's own: nothing to wrap (REPA and its family)."""
    return backbone


def unwrapped(backbone: Backbone) -> Backbone:
    """The network inside its clock: what checkpoints of the official codes hold."""
    return backbone.backbone if isinstance(backbone, _Clock) else backbone


class _Clock(nn.Module):
    """A backbone behind a change of time; taps and carry pass through."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def tap_specs(self) -> Mapping[str, TokenSpec]:
        """The wrapped backbone's taps."""
        return self.backbone.tap_specs

    @property
    def uses_carry(self) -> bool:
        """Whether the wrapped backbone uses a carry."""
        return self.backbone.uses_carry

    @property
    def skips_blocks(self) -> bool:
        """Whether the wrapped backbone can pass over blocks (``cond.skip``)."""
        return getattr(self.backbone, "skips_blocks", False)

    @property
    def units(self) -> Sequence[nn.Module]:
        """Those of the wrapped backbone."""
        return getattr(self.backbone, "units", ())

    @property
    def times(self) -> tuple[str, ...]:
        """Those of the wrapped backbone but ``branch``: the velocities of inner branches would keep their sign."""
        return tuple(kind for kind in getattr(self.backbone, "times", ("sample",)) if kind != "branch")


class ReversedClock(_Clock):
    """A network whose time runs from noise (0) to data (1): it is fed 1 - t (SiT, LightningDiT, DDT, ReDi, SVG).

    With ``flip_sign`` its prediction is a velocity dx/d(1-t) and changes its sign; predictions of noise, score or data
    do not. Exact up to the rounding of 1 - t.
    """

    def __init__(self, backbone: Backbone, flip_sign: bool = True) -> None:
        super().__init__(backbone)
        self.flip_sign = flip_sign

    def forward(
        self,
        x_t: State,
        t: Tensor,
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Call the network at 1 - t."""
        out = self.backbone(x_t, 1 - t, cond, taps=taps, only_taps=only_taps, carry=carry)
        if out.pred is None or not self.flip_sign:
            return out
        return replace(out, pred=-out.pred)


class StepClock(_Clock):
    """A network made for discrete steps 0 .. steps - 1: it is fed round(t * steps) - 1, unscaled (DDPM, LDM, DiT).

    House time t = (step + 1) / steps, because step 0 already is one noising step away from the data.
    """

    def __init__(self, backbone: Backbone, steps: int = 1000) -> None:
        super().__init__(backbone)
        self.steps = steps

    def forward(
        self,
        x_t: State,
        t: Tensor,
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Call the network at the step that t stands for."""
        step = (t * self.steps).round() - 1
        return self.backbone(x_t, step, cond, taps=taps, only_taps=only_taps, carry=carry)
