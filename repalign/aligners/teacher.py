"""The averaged backbone on a less noisy state as the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from repalign.errors import unknown_choice
from repalign.protocols import Context, Path, Randomness
from repalign.state import Draw, Tokens, TokenSpec


class TeacherTarget:
    """A hidden state of the averaged backbone (EMA) at an earlier time of the same path (SRA, arXiv:2505.02831).

    The teacher sees x_t' = alpha_t' x_0 + sigma_t' eps with the student's x_0 and eps and t' <= t; it runs in
    evaluation mode, without gradient, up to the layer that is wanted. The target has no head.

    Args:
        tap: name of the hidden state, a layer after the student's.
        path: between data and noise, the objective's.
        time: from the step's draw and its streams to t' (:mod:`repalign.paths.earlier`).
        dropped: give the teacher the student's conditions after dropping (SRA); otherwise those before (dual
            timesteps).
        separate: keep the teacher's groups of tokens apart as the draw has them (dual timesteps).

    Raises:
        UserError: when the backbone has no such tap.
    """

    taps = ()

    def __init__(
        self,
        tap: str,
        path: Path,
        time: Callable[[Draw, Randomness], Tensor],
        dropped: bool = True,
        separate: bool = False,
    ) -> None:
        self.tap = tap
        self.path = path
        self.time = time
        self.dropped = dropped
        self.separate = separate

    @property
    def times(self) -> tuple[str, ...]:
        """The times of an objective (:class:`repalign.protocols.Objective`) for which an earlier one is known."""
        return getattr(self.time, "times", ("sample",))

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec:
        """Layout of the layer; teacher and student are the same network."""
        if self.tap not in taps:
            raise unknown_choice("aligner.target.tap", self.tap, taps, "tap of this backbone")
        return taps[self.tap]

    @torch.no_grad()
    def __call__(self, context: Context) -> Tokens:
        assert context.teacher is not None, "this training keeps no average of the backbone"
        assert context.random is not None, "this training hands no random streams to its aligners"
        assert context.draw.eps is not None, "a teacher needs an objective that adds noise"
        earlier = self.time(context.draw, context.random)
        sample = self.path.sample(context.x_0, context.draw.eps, earlier)
        cond = context.cond if self.dropped else context.undropped()
        if self.separate:
            cond = replace(cond, groups=context.draw.groups)
        return context.teacher(sample.x_t, sample.t, cond, taps=(self.tap,), only_taps=True).taps[self.tap]
