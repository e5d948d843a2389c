"""Deep supervision of a flow's velocity, with an acceleration between the branches."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from repalign.errors import UserError
from repalign.nn.precision import at_least_float32
from repalign.paths.interpolant import scale
from repalign.paths.parametrization import Velocity
from repalign.protocols import Backbone, Path, Randomness, TimeSampler
from repalign.state import Cond, Draw, PathSample, State, Step, mean_per_sample


class DeepSupervision:
    """Every branch's velocity against the path's, and a second-order step from every inner branch to the data.

    ``denoising`` = sum_k w_k mean |v_k - v(t_k)|^2 over all K branches, the last one being the prediction;
    ``acceleration`` = lambda sum_{k<K} mean |x_{t_k} + sg(v_k) d_k + a_k d_k^2 / 2 - x_0|^2 with d_k = -t_k, the whole
    way to the data. Both [B]. Velocities are detached in the second, so that it trains the accelerations and what lies
    below them. All x_{t_k} share one noise; the backbone sees x_{t_1} alone. Computed in float32 at least.

    On the linear path v is eps - x_0 at all times. Source: DeepFlow, arXiv:2503.14494.

    Deviation: the official code takes eps - x_0 as the target on every path, here it is the velocity of the path.

    Args:
        path: between data and noise.
        time_sampler: K times a sample (:class:`repalign.paths.time.Ladder`).
        weights: w_1 .. w_K, not normalised.
        acceleration_weight: lambda.

    Raises:
        UserError: at a call, when times, weights and branches of the backbone are not of one number. A backbone says
            how many branches it has by its attribute ``branches``; without one it has a single branch.
    """

    times = "branch"

    def __init__(
        self, path: Path, time_sampler: TimeSampler, weights: Sequence[float], acceleration_weight: float
    ) -> None:
        self.path = path
        self.time_sampler = time_sampler
        self.weights = [float(weight) for weight in weights]
        self.acceleration_weight = acceleration_weight

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """A ladder of times from the streams of the time sampler, noise from the stream ``eps``."""
        return Draw(t=self.time_sampler(random), eps=random.normal_like("eps", x_0))

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
        """One pass of the backbone, two losses; with ``only_taps`` there are no losses."""
        assert draw.t is not None and draw.eps is not None, "this objective's own draw has times and noise"
        assert isinstance(x_0, Tensor), "deep supervision is for a state of one stream"
        self._check_number_of_branches(backbone, draw.t)
        rungs = [self.path.sample(x_0, draw.eps, t) for t in draw.t.unbind(1)]
        output = backbone(rungs[0].x_t, draw.t, cond, taps=taps, only_taps=only_taps)
        if output.pred is None:
            return Step({}, output, rungs[0])
        inner = range(1, len(rungs))
        velocities = [_tensor(output.heads[f"velocity.{k}"]) for k in inner] + [_tensor(output.pred)]
        accelerations = [_tensor(output.heads[f"acceleration.{k}"]) for k in inner]
        denoising = [
            weight * _mean_square(v - _tensor(Velocity().target(sample)))
            for weight, v, sample in zip(self.weights, velocities, rungs, strict=True)
        ]
        losses = {"denoising": sum(denoising[1:], denoising[0])}
        if accelerations:
            arrivals = [arrival(*rung) for rung in zip(rungs, velocities, accelerations, strict=False)]
            misses = [_mean_square(x - x_0) for x in arrivals]
            losses["acceleration"] = self.acceleration_weight * sum(misses[1:], misses[0])
        return Step(losses, output, rungs[0])

    def _check_number_of_branches(self, backbone: Backbone, t: Tensor) -> None:
        branches, times = getattr(backbone, "branches", 1), t.shape[1] if t.ndim == 2 else 1
        if t.ndim != 2 or not branches == times == len(self.weights):
            raise UserError(
                f"objective.weights: {len(self.weights)} branches are weighted, the backbone has {branches} "
                f"({type(backbone).__name__}) and time_sampler gives {times} time(s) a sample; choose "
                "backbone=deepflow_*, clock=native, time_sampler=ladder and one weight a branch"
            )


def arrival(sample: PathSample, velocity: Tensor, acceleration: Tensor) -> Tensor:
    """Where a second-order step from x_t to t = 0 ends: x_t - sg(v) t + a t^2 / 2."""
    t = sample.t
    return _tensor(sample.x_t - scale(t, velocity.detach()) + scale(0.5 * t * t, acceleration))


def _mean_square(difference: Tensor) -> Tensor:
    return _tensor(mean_per_sample(difference * difference))


def _tensor(state: State) -> Tensor:
    assert isinstance(state, Tensor)
    return at_least_float32(state)
