"""Variance-preserving paths: continuous (score SDE, SiT) and discrete (DDPM, LDM, DiT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.interpolant import Interpolant, scale
from repalign.paths.schedules import SCHEDULES, Ends, kept_steps
from repalign.state import Coefficients, State, expand, map_state


class VPPath(Interpolant):
    """alpha_t = exp(L), sigma_t = sqrt(1 - exp(2 L)), L = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.

    The marginals of dx = -beta_t/2 x dt + sqrt(beta_t) dW with beta_t = beta_min + t (beta_max - beta_min)
    (arXiv:2011.13456, equation 33; SiT's VP with its time reversed). alpha_1 = exp(-5.025) by default, not 0;
    d sigma / dt is infinite at t = 0.

    Raises:
        UserError: when not 0 < beta_min <= beta_max.
    """

    singular_at_data = True

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise UserError(f"path: expected 0 < beta_min <= beta_max, found {beta_min} and {beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """Coefficients at t in (0, 1]."""
        rise = self.beta_max - self.beta_min
        log_alpha = -0.25 * rise * t**2 - 0.5 * self.beta_min * t
        return _variance_preserving(2 * log_alpha, -rise * t - self.beta_min)


def _variance_preserving(log_alpha_bar: Tensor, slope: Tensor) -> Coefficients:
    """Coefficients from log alpha^2 and its derivative; alpha^2 + sigma^2 = 1."""
    alpha = torch.exp(0.5 * log_alpha_bar)
    # expm1 keeps sigma exact near data, where 1 - alpha^2 would cancel.
    sigma = torch.sqrt(-torch.expm1(log_alpha_bar))
    return Coefficients(alpha, sigma, 0.5 * slope * alpha, -0.5 * slope * alpha**2 / sigma)


@dataclass(frozen=True)
class Posterior:
    """q(x_{k-1} | x_k, x_0) = N(x_0 weight * x_0 + x_t weight * x_k, variance) of a step k, each entry float64.

    Attributes:
        weight_x_0, weight_x_t: of the mean.
        variance: beta_k (1 - abar_{k-1}) / (1 - abar_k); 0 at the first step.
        log_variance: its logarithm; the first step has that of the second, because log 0 is infinite.
        log_beta: log beta_k, the largest variance that a reverse step may have.
    """

    weight_x_0: Tensor
    weight_x_t: Tensor
    variance: Tensor
    log_variance: Tensor
    log_beta: Tensor

    def mean(self, x_0: State, x_t: State) -> State:
        """Mean of the earlier state."""
        return scale(self.weight_x_0, x_0) + scale(self.weight_x_t, x_t)

    def learned_log_variance(self, head: State) -> State:
        """Log variance f log beta + (1 - f) log posterior variance, f = (head + 1) / 2 (improved DDPM, equation 15)."""
        fraction = map_state(lambda x: (x + 1) / 2, head)
        low, high = expand(self.log_variance, head), expand(self.log_beta, head)
        return fraction * (high - low) + low


class DiscreteVPPath(Interpolant):
    """The chain of DDPM as a path: alpha_k^2 = abar_k = prod_{i <= k} (1 - beta_i) at house time (k + 1) / steps.

    So t = 0 is clean data, step 0 is one noising step away from it, and step ``steps - 1`` is at t = 1. Between two
    steps log abar is interpolated linearly, which gives derivatives and lets every ODE sampler run on it. Tables are
    float64; :meth:`respaced` keeps some of the steps, on the clock of the whole chain: a network is called at the same
    times as before.

    Args:
        steps: length T of the whole chain.
        schedule: of the betas: ``linear``, ``scaled_linear``, ``sqrt`` or ``squaredcos_cap_v2``, see
            :mod:`repalign.paths.schedules`.
        ends: first and last beta; None for the schedule's own.
        respacing: which steps stay, see :func:`repalign.paths.schedules.kept_steps`.

    Attributes:
        timestep_map: the steps of the whole chain that are kept, [S] int64.
        times: their house times (step + 1) / T, [S] float64.
        betas, alphas_cumprod: of the kept chain, [S] float64; beta_k = 1 - abar_k / abar_{k-1} over kept steps.

    Raises:
        UserError: for an unknown schedule, fewer than two steps or an impossible respacing.
    """

    singular_at_data = True

    def __init__(
        self, steps: int = 1000, schedule: str = "linear", respacing: str | int = "", ends: Ends | None = None
    ) -> None:
        if schedule not in SCHEDULES:
            raise unknown_choice("path.schedule", schedule, SCHEDULES, "schedule")
        if steps < 2:
            raise UserError(f"path.steps must be at least 2, found {steps}")
        self.steps = steps
        self.schedule = schedule
        self.ends = ends
        self._copies: dict[torch.device, tuple[Tensor, Tensor, Posterior]] = {}
        whole_betas = SCHEDULES[schedule](steps, ends)
        if not (0 < float(whole_betas.min()) and float(whole_betas.max()) < 1):
            raise UserError(f"path.steps: {steps} is too short for the schedule '{schedule}', its betas leave (0, 1)")
        whole = torch.cumprod(1 - whole_betas, 0)
        self._log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), whole.log()])
        self.timestep_map: Int[Tensor, " s"] = torch.tensor(kept_steps(steps, respacing))
        self.times: Float[Tensor, " s"] = (self.timestep_map + 1).double() / steps

        kept = whole[self.timestep_map]
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        self.betas: Float[Tensor, " s"] = 1 - kept / before
        self.alphas_cumprod: Float[Tensor, " s"] = kept
        variance = self.betas * (1 - before) / (1 - kept)
        self._posterior = Posterior(
            weight_x_0=self.betas * before.sqrt() / (1 - kept),
            weight_x_t=(1 - before) * (kept / before).sqrt() / (1 - kept),
            variance=variance,
            log_variance=torch.cat([variance[1:2], variance[1:]]).log() if len(kept) > 1 else self.betas.log(),
            log_beta=self.betas.log(),
        )

    def __len__(self) -> int:
        return len(self.timestep_map)

    def _at(self, device: torch.device) -> tuple[Tensor, Tensor, Posterior]:
        """Kept steps, log abar and the posterior's tables on a device, copied once: a copy in every step would wait."""
        if device not in self._copies:
            p = self._posterior
            tables = (p.weight_x_0, p.weight_x_t, p.variance, p.log_variance, p.log_beta)
            posterior = Posterior(*(table.to(device) for table in tables))
            self._copies[device] = self.timestep_map.to(device), self._log_alpha_bar.to(device), posterior
        return self._copies[device]

    def respaced(self, spec: str | int) -> DiscreteVPPath:
        """The same chain with fewer steps; ``spec`` is relative to the whole chain."""
        return DiscreteVPPath(self.steps, self.schedule, spec, self.ends)

    def step_of(self, t: Float[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """Index among the kept steps of the step at time t (between two kept ones: of the later)."""
        step = (t * self.steps).round().long() - 1
        return torch.searchsorted(self._at(t.device)[0], step)

    def posterior(self, index: Int[Tensor, "*b"]) -> Posterior:
        """The reverse step from the kept step ``index`` to the one before it, entries shaped like ``index``."""
        p = self._at(index.device)[2]
        tables = (p.weight_x_0, p.weight_x_t, p.variance, p.log_variance, p.log_beta)
        return Posterior(*(table[index] for table in tables))

    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """Coefficients at t in (0, 1], computed in float64 and returned in the dtype of t."""
        position = t.double() * self.steps
        # A float32 time hits its step to about 1e-4 of a step; take the table's value there, as the official codes do.
        position = torch.where((position - position.round()).abs() < 1e-3, position.round(), position)
        later = position.ceil().long().clamp(1, self.steps)
        table = self._at(t.device)[1]
        slope = table[later] - table[later - 1]
        c = _variance_preserving(table[later] + (position - later) * slope, slope * self.steps)
        return Coefficients(*(x.to(t.dtype) for x in (c.alpha, c.sigma, c.d_alpha, c.d_sigma)))
