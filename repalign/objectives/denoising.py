"""The denoising (score, flow matching) loss."""

from __future__ import annotations

from collections.abc import Collection

from repalign.errors import UserError
from repalign.nn.precision import at_least_float32
from repalign.objectives.weighting import Weighting
from repalign.paths.interpolant import scale
from repalign.paths.parametrization import Quantity
from repalign.protocols import Backbone, Parametrization, Path, Randomness, TimeSampler
from repalign.state import Cond, Draw, State, Step, Streams, map_state, mean_per_sample


class Denoising:
    """loss = w_t mean |pred - target|^2 at one random time per sample: DDPM's simple loss, flow matching, SiT, REPA.

    A plain state [B, ...] gives the loss ``denoising`` [B]; a state of several streams gives ``denoising/<stream>`` for
    each. Computed in float32 at least, whatever the autocast precision of the backbone.

    Args:
        path: between data and noise.
        parametrization: what the backbone predicts.
        time_sampler: which times are trained.
        weighting: w_t; None for 1.
        error: the quantity in which the error is measured, when it is not the predicted one. SiT measures a score's
            error as ``Noise``, and its weight ``velocity`` is the error as ``Velocity``; JiT predicts ``Data`` and
            measures ``Velocity``.

    Raises:
        UserError: at a draw, when the time sampler gives more than one time a sample.
    """

    def __init__(
        self,
        path: Path,
        parametrization: Parametrization,
        time_sampler: TimeSampler,
        weighting: Weighting | None = None,
        error: Quantity | None = None,
    ) -> None:
        self.path = path
        self.parametrization = parametrization
        self.time_sampler = time_sampler
        self.weighting = weighting
        self.error = error

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """Times from the stream of the time sampler, noise from the stream ``eps``."""
        t = self.time_sampler(random)
        if t.ndim != 1:
            raise UserError(
                f"time_sampler and objective do not go together: {type(self.time_sampler).__name__} gives "
                f"{t.shape[1]} times a sample, this objective takes one; set objective=deepflow backbone=deepflow_*, "
                "or another time_sampler"
            )
        return Draw(t=t, eps=random.normal_like("eps", x_0))

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
        """One pass of the backbone; with ``only_taps`` there is no prediction and no loss."""
        assert draw.t is not None and draw.eps is not None, "this objective's own draw has times and noise"
        sample = self.path.sample(x_0, draw.eps, draw.t)
        output = backbone(sample.x_t, sample.t, cond, taps=taps, only_taps=only_taps)
        if output.pred is None:
            return Step({}, output, sample)
        pred, c = map_state(at_least_float32, output.pred), sample.coefficients
        if self.error is None:
            difference = pred - self.parametrization.target(sample)
        else:
            read = self.error.read(self.parametrization, pred, sample.x_t, c)
            difference = read - self.error.target(sample)
        loss = mean_per_sample(difference * difference)
        if self.weighting is not None:
            loss = scale(self.weighting(c), loss)
        if isinstance(loss, Streams):
            return Step({f"denoising/{name}": value for name, value in loss.items()}, output, sample)
        return Step({"denoising": loss}, output, sample)
