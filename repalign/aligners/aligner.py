"""One alignment term: tap x target x head x similarities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError, unknown_choice
from repalign.nn.precision import at_least_float32
from repalign.protocols import Context, Similarity, Target
from repalign.state import TokenSpec


class Aligner(nn.Module):
    """Pulls a hidden state of the backbone towards a target representation.

    loss [B] = sum_k w_k similarity_k(resize(head(tap)), target), computed in float32 whatever the autocast precision.
    When the target has as many prefix tokens as the tap these are aligned as well (REG), otherwise both drop theirs.

    Args:
        tap: name of the hidden state, for instance ``block.8`` (after the 8th block).
        target: what it is aligned with.
        head: makes the trainable head from (width of the tap, width of the target).
        similarities: pairs of weight and similarity; they share the head's output.
        weight: coefficient of this term in the total loss (REPA: 0.5), or a schedule from the number of finished steps
            to it (:mod:`repalign.aligners.weights`).
        resize: ``never`` demands equal grids (REPA); ``student`` resamples the head's output to the target's grid
            (U-REPA); ``target`` resamples the target to the tap's grid.
        tap_specs: the backbone's taps.
        features: token layout of every encoder, by name.

    Raises:
        UserError: when the tap or the encoder does not exist, or the grids differ under ``resize: never``.
    """

    def __init__(
        self,
        tap: str,
        target: Target,
        head: Callable[[int, int], nn.Module],
        similarities: Sequence[tuple[float, Similarity]],
        weight: float | Callable[[int], float],
        *,
        resize: Literal["never", "student", "target"] = "never",
        tap_specs: Mapping[str, TokenSpec],
        features: Mapping[str, TokenSpec],
    ) -> None:
        super().__init__()
        if tap not in tap_specs:
            raise unknown_choice("aligner.tap", tap, tap_specs, "tap of this backbone")
        source, goal = tap_specs[tap], target.spec(tap_specs, features)
        if resize == "never" and source.grid != goal.grid:
            raise UserError(
                f"aligner: tap '{tap}' has a grid of {_size(source)} tokens but the target has {_size(goal)}; choose "
                "an encoder input size or backbone.patch that makes them equal, or set aligner resize=student|target"
            )
        self.tap = tap
        self.taps = (tap, *getattr(target, "taps", ()))
        self.target = target
        self.head = head(source.dim, goal.dim)
        self.similarities = [(float(w), similarity) for w, similarity in similarities]
        self.weight = weight
        self.resize = resize
        self.keep_prefix = source.prefix == goal.prefix

    def forward(self, context: Context) -> Float[Tensor, " b"]:
        student, target = context.step.output.taps[self.tap], self.target(context)
        if not self.keep_prefix:
            student, target = student.patches, target.patches
        if self.resize == "target" and student.grid is not None:
            target = target.resize(student.grid)
        student = student.with_data(self.head(student.data))
        if self.resize == "student" and target.grid is not None:
            student = student.resize(target.grid)
        compared = at_least_float32(student.data), at_least_float32(target.data)
        pairs = [w * similarity(*compared) for w, similarity in self.similarities]
        return sum(pairs[1:], pairs[0])


def _size(spec: TokenSpec) -> str:
    return "no" if spec.grid is None else f"{spec.grid[0]} x {spec.grid[1]}"
