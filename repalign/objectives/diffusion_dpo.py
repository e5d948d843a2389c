"""Direct preference optimisation of diffusion and flow models."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.weighting import Weighting
from repalign.paths.parametrization import Quantity
from repalign.protocols import Backbone, Parametrization, Path, Randomness, TimeSampler
from repalign.state import Cond, Draw, State, Step, map_state

Reference = Callable[[Backbone], AbstractContextManager[Backbone]]  # of a network -> the frozen one, for a while


class DiffusionDPO:
    """Diffusion-DPO (arXiv:2311.12908): prefer w over l of one prompt, by the change of the denoising error.

    e = mean over (C, H, W) of w_t |pred - target|^2 at one time and one noise for both pictures of a pair;
    margin = -(beta / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)]; loss = -log sigmoid(margin). The reference is the network
    before tuning, without gradients. With a rectified flow, e is the error of the velocity (SD3, arXiv:2403.03206,
    appendix C); with a variance-preserving path and noise prediction, that of eps.

    The batch holds 2 P samples, P preferred ones, then their P rejected ones in the same order (``data=pairs_folder``).
    losses: ``dpo`` [P]. figures [P]: ``margin``, the difference of implicit rewards; ``accuracy``, 1 where it is
    positive; ``error/preferred``, ``error/rejected`` and, of the reference, ``error/preferred_before``,
    ``error/rejected_before``. Computed in float32 at least. The official code draws dropped prompts and the noise of
    the autoencoder for each picture; here a pair shares them, because it shares a serial number.

    Args:
        path: between data and noise.
        parametrization: what the backbone predicts.
        time_sampler: which times are trained.
        beta: strength of the pull towards the reference: 2000 (SD 1.5) to 5000 (SDXL) in Diffusion-DPO.
        reference: gives the frozen network for the time of a ``with``; by ``tuning=lora`` the same one without its
            additions, so that there is no second copy.
        weighting, error: see :class:`repalign.objectives.denoising.Denoising`.

    Raises:
        UserError: when beta is not positive, or at a batch of an odd number of samples.
    """

    pairs: ClassVar[bool] = True  # of what its batches consist

    def __init__(
        self,
        path: Path,
        parametrization: Parametrization,
        time_sampler: TimeSampler,
        beta: float,
        reference: Reference,
        weighting: Weighting | None = None,
        error: Quantity | None = None,
    ) -> None:
        if not beta > 0:
            raise UserError(f"objective.beta: expected a positive number, found {beta}")
        self.path = path
        self.parametrization = parametrization
        self.denoising = Denoising(path, parametrization, time_sampler, weighting, error)
        self.beta = beta
        self.reference = reference

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """The draw of the denoising loss, that of a preferred picture for its rejected one as well."""
        draw = self.denoising.draw(x_0, random)
        assert draw.t is not None and draw.eps is not None, "denoising draws times and noise"
        if len(draw.t) % 2:
            raise UserError(
                f"objective: diffusion_dpo takes pairs, found a batch of {len(draw.t)}; set data=pairs_folder or so"
            )
        return replace(draw, t=_for_both(draw.t), eps=map_state(_for_both, draw.eps))

    def __call__(
        self,
        backbone: Backbone,
        x_0: State,
        cond: Cond,
        draw: Draw,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
    ) -> Step:
        """A pass of the backbone and one of the reference; with ``only_taps`` neither prediction nor loss."""
        step = self.denoising(backbone, x_0, cond, draw, taps=taps, only_taps=only_taps)
        if step.output.pred is None:
            return step
        with torch.no_grad(), self.reference(backbone) as frozen:
            before = _halves(self.denoising(frozen, x_0, cond, draw))
        now = _halves(step)
        margin = -0.5 * self.beta * ((now[0] - before[0]) - (now[1] - before[1]))
        figures = {"margin": margin, "accuracy": (margin > 0).to(margin.dtype)}
        for name, of_now, of_before in zip(("preferred", "rejected"), now, before, strict=True):
            figures |= {f"error/{name}": of_now, f"error/{name}_before": of_before}
        return Step({"dpo": -F.logsigmoid(margin)}, step.output, step.sample, figures)


def _for_both(tensor: Tensor) -> Tensor:
    first = tensor[: len(tensor) // 2]
    return torch.cat([first, first])


def _halves(step: Step) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """The errors of preferred and of rejected samples, over all streams."""
    total = torch.stack(list(step.losses.values())).sum(0)
    preferred, rejected = total.chunk(2)
    return preferred, rejected
