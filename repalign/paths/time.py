"""Time samplers: at which times a network is trained. All give t in [0, 1] with t = 1 noise: [B], a ladder [B, K]."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.paths.interval import time_interval
from repalign.protocols import Parametrization, Path, Randomness, TimeSampler


class Uniform:
    """t ~ U[low, high).

    Args:
        low, high: ends of the interval. The whole of [0, 1] suits a velocity on the linear or trigonometric path; what
            SiT uses for the other pairs is :func:`repalign.paths.interval.time_interval` with ``train=True``.

    Raises:
        UserError: when not 0 <= low < high <= 1.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not 0 <= low < high <= 1:
            raise UserError(f"time_sampler: expected 0 <= low < high <= 1, found low={low}, high={high}")
        self.low = low
        self.high = high

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return random.uniform("t") * (self.high - self.low) + self.low


def uniform_within(path: Path, parametrization: Parametrization) -> Uniform:
    """Uniform times over SiT's training interval of this path and prediction.

    All of [0, 1] for a velocity on the linear or trigonometric path, away from the singular ends otherwise; see
    :func:`repalign.paths.interval.time_interval`.
    """
    safe = time_interval(path, parametrization, train=True)
    return Uniform(safe.low, safe.high)


class LogitNormal:
    """t = sigmoid(n), n ~ N(mean, std^2) (SD3, arXiv:2403.03206); with mean 0 and std 1 REPA's ``lognormal``.

    On the linear path the ratio sigma_t / alpha_t = exp(n) is log-normal.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return torch.sigmoid(self.mean + self.std * random.normal("t"))

    def density(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """pi(t) = exp(-(logit t - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t)) (SD3, equation 19)."""
        normal = torch.exp(-((torch.logit(t) - self.mean) ** 2) / (2 * self.std**2))
        return normal / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


class Mode:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u ~ U[0, 1): heavy tails around a mode at 1/2 (SD3, equation 20).

    Args:
        scale: s; 0 is uniform, above 0 favours the middle, below 0 the ends. SD3 tries -1 to 1.75 and likes 1.29.

    Raises:
        UserError: when s is outside [-1, 2 / (pi - 2)], where the map is not monotone.
    """

    def __init__(self, scale: float) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise UserError(f"time_sampler.scale: expected -1 to {2 / (math.pi - 2):.4f}, found {scale}")
        self.scale = scale

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        u = random.uniform("t")
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


class CosMap:
    """t = 1 - 1 / (tan(pi u / 2) + 1), u ~ U[0, 1): the log-SNR density of the cosine schedule."""

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return 1 - 1 / (torch.tan(math.pi / 2 * random.uniform("t")) + 1)

    @staticmethod
    def density(t: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """pi(t) = 2 / (pi - 2 pi t + 2 pi t^2)."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


class ArctanLogNormal:
    """t = (2/pi) atan(exp(n)), n ~ N(mean, std^2): REPA's ``lognormal`` for its cosine path.

    On the trigonometric path the ratio sigma_t / alpha_t = tan(pi t / 2) = exp(n) is log-normal.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return torch.atan(torch.exp(self.mean + self.std * random.normal("t"))) * (2 / math.pi)


class UniformSteps:
    """t = (k + 1) / steps for a uniform integer step k in 0 .. steps - 1 (DDPM, DiT); so t = 0 never occurs."""

    def __init__(self, steps: int = 1000) -> None:
        if steps < 1:
            raise UserError(f"time_sampler.steps must be at least 1, found {steps}")
        self.steps = steps

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return (random.integers("t", 0, self.steps) + 1).to(torch.float32) / self.steps


class Shifted:
    """Times of another sampler, moved towards the noise by :func:`shift_time` (SD3: 3 at 1024 pixels).

    Args:
        base: the time sampler that is shifted.
        shift: s > 1 gives noisier times, s = 1 changes nothing.

    Raises:
        UserError: when ``shift`` is not positive.
    """

    def __init__(self, base: TimeSampler, shift: float) -> None:
        if shift <= 0:
            raise UserError(f"time_sampler.shift must be positive, found {shift}")
        self.base = base
        self.shift = shift

    def __call__(self, random: Randomness) -> Float[Tensor, " b"]:
        return shift_time(self.base(random), self.shift)


class Ladder:
    """K times a sample, each a tiny random step from the one before: [B, K] (DeepFlow, arXiv:2503.14494).

    t_1 comes from another sampler; t_k = clip(t_{k-1} + s g_k, 0, 1) with g_k ~ U[0, gap) and one sign s a sample, so
    that a ladder climbs or descends as a whole.

    Args:
        base: the sampler of t_1.
        rungs: number of times K.
        gap: largest step between two rungs.

    Deviation: the official code draws one sign for a whole batch; here every sample has its own, because nothing that a
    sample draws depends on its batch.

    Raises:
        UserError: when there is no rung, or the gap is outside [0, 1].
    """

    def __init__(self, base: TimeSampler, rungs: int, gap: float) -> None:
        if rungs < 1:
            raise UserError(f"time_sampler.rungs must be at least 1, found {rungs}")
        if not 0 <= gap <= 1:
            raise UserError(f"time_sampler.gap must be in [0, 1], found {gap}")
        self.base = base
        self.rungs = rungs
        self.gap = gap

    def __call__(self, random: Randomness) -> Float[Tensor, "b k"]:
        times = [self.base(random)]
        step = torch.where(random.uniform("t/sign") < 0.5, self.gap, -self.gap)
        for k in range(2, self.rungs + 1):
            times.append((times[-1] + step * random.uniform(f"t/gap.{k}")).clamp(0, 1))
        return torch.stack(times, 1)


def shift_time(t: Float[Tensor, "*b"], shift: float) -> Float[Tensor, "*b"]:
    """Shifted time s t / (1 + (s - 1) t): the ends stay, s > 1 moves the rest towards the noise (SD3, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)
