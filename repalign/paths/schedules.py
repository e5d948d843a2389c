"""Discrete noise schedules of DDPM and the selection of steps for shorter sampling chains."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import accumulate, repeat

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError

Ends = tuple[float, float]  # the first and the last beta


def linear_betas(steps: int, ends: Ends | None = None) -> Float[Tensor, " t"]:
    """Betas from 1e-4 to 0.02 over 1000 steps, both scaled by 1000/steps for other lengths (DDPM, DiT); float64.

    ``ends`` that are given are not scaled (LDM's ``sqrt_linear``).
    """
    if ends is None:
        ends = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    return torch.linspace(*ends, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, ends: Ends | None = None) -> Float[Tensor, " t"]:
    """Betas whose square roots are spaced evenly between those of ``ends``: what LDM calls ``linear``; float64.

    Without ends those of Stable Diffusion and of LDM's text model: 0.00085 and 0.012.
    """
    low, high = (0.00085, 0.012) if ends is None else ends
    return torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2


def sqrt_betas(steps: int, ends: Ends | None = None) -> Float[Tensor, " t"]:
    """Square roots of numbers spaced evenly between ``ends``, without them between 1e-4 and 0.02 (LDM); float64."""
    low, high = (1e-4, 0.02) if ends is None else ends
    return torch.linspace(low, high, steps, dtype=torch.float64) ** 0.5


def cosine_betas(steps: int, ends: Ends | None = None) -> Float[Tensor, " t"]:
    """beta_k = min(1 - a((k+1)/steps) / a(k/steps), 0.999), a(s) = cos^2(pi/2 (s + 0.008) / 1.008); float64.

    Source: improved DDPM (arXiv:2102.09672), equation 17; the official codes call it ``squaredcos_cap_v2``, LDM
    ``cosine``.

    Raises:
        UserError: when ends are given, which this schedule does not have.
    """
    if ends is not None:
        raise UserError(f"path.ends: found {list(ends)}, but squaredcos_cap_v2 has none; set path.ends=null")
    s = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: Mapping[str, Callable[[int, Ends | None], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "sqrt": sqrt_betas,
    "squaredcos_cap_v2": cosine_betas,
}


def kept_steps(steps: int, spec: str | int) -> list[int]:
    """The steps of a chain of ``steps`` that a respacing keeps, in ascending order (improved DDPM, ADM, DiT).

    Args:
        steps: length of the whole chain.
        spec: ``""`` keeps all. ``"250"`` (or 250) spreads 250 steps over the chain, both ends included. ``"10,15,20"``
            cuts the chain into three nearly equal sections and spreads 10, 15 and 20 steps over them. ``"ddim50"``
            takes every n-th step from 0, with the smallest n that gives 50. ``"ldm50"`` takes every n-th from 1, n the
            whole part of steps/50, which gives more than 50 steps when 50 does not divide them; ``"ldm_quad50"`` takes
            1 + the whole part of (k a)^2 for 50 values of k a spaced evenly over [0, sqrt(0.8 steps)], some of them
            twice near the data (LDM's ``uniform`` and ``quad``).

    Raises:
        UserError: when the specification is none of these, or asks for more steps than a section has.
    """
    spec = str(spec).strip()
    if not spec:
        return list(range(steps))
    if re.fullmatch(r"ddim[1-9]\d*", spec):
        return _strided(steps, int(spec.removeprefix("ddim")))
    if re.fullmatch(r"ldm(_quad)?[1-9]\d*", spec):
        return _ldm_steps(steps, int(spec.removeprefix("ldm").removeprefix("_quad")), "quad" in spec)
    if not re.fullmatch(r"[1-9]\d*(\s*,\s*[1-9]\d*)*", spec):
        raise UserError(
            f"sampler.steps: found '{spec}', expected a number (250), sections (10,15,20), ddimN (ddim50) or ldmN"
        )
    counts = [int(count) for count in spec.split(",")]
    size, extra = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UserError(f"sampler.steps: '{spec}' asks for {count} of the {length} steps of section {section + 1}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Added up step by step as the official codes do: a product may round the other way at a half.
        kept += [start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    return kept


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps + 1):
        kept = range(0, steps, stride)
        if len(kept) == count:
            return list(kept)
    raise UserError(f"sampler.steps: no whole stride takes {count} of {steps} steps; use '{count}' without 'ddim'")


def _ldm_steps(steps: int, count: int, quadratic: bool) -> list[int]:
    if not quadratic and count > steps // 2:
        raise UserError(f"sampler.steps: 'ldm{count}' leaves the chain of {steps} steps; use '{count}' without 'ldm'")
    if not quadratic:
        return [step + 1 for step in range(0, steps, steps // count)]
    return [int(value) + 1 for value in torch.linspace(0, math.sqrt(0.8 * steps), count, dtype=torch.float64) ** 2]
