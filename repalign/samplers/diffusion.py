"""Diffusion coefficients w_t of the reverse SDE: any choice has the same marginals, so it is made after training.

In the house's time dx = (v - w s) dt + sqrt(2 w) dW runs from t = 1 to 0 (SiT's code; its paper writes w for our 2 w).
Each object is called with the time and the path's coefficients, both scalars or [B], and gives w_t of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import unknown_choice
from repalign.paths.parametrization import linear_drift
from repalign.state import Coefficients


class Diffusion(Protocol):
    """w_t of a time and its coefficients."""

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]: ...


class Constant:
    """w = norm."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return torch.full_like(t, self.norm)


class SBDM:
    """w = norm g, the diffusion of the forward process itself (score SDE); infinite at t = 1 where alpha is 0 there."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return self.norm * linear_drift(c)[1]


class Sigma:
    """w = norm sigma_t; the default of SiT's sampling script."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return self.norm * c.sigma


class Linear:
    """w = norm t. With norm 1 this is REPA's SDE on both of its paths: REPA writes w_t = 2 t and sqrt(w_t)."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return self.norm * t


class Decreasing:
    """w = (1 - norm cos(pi t))^2 / 4: falls towards the data, 0 there for norm 1."""

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return 0.25 * (1 - self.norm * torch.cos(math.pi * t)) ** 2


class IncreasingDecreasing:
    """w = norm sin^2(pi t): 0 at both ends.

    Deviation: SiT's code knows it by a misspelt key alone, so that its own command line cannot reach it.
    """

    def __init__(self, norm: float = 1.0) -> None:
        self.norm = norm

    def __call__(self, t: Float[Tensor, "*b"], c: Coefficients) -> Float[Tensor, "*b"]:
        return self.norm * torch.sin(math.pi * t) ** 2


FORMS: Mapping[str, Callable[[float], Diffusion]] = {
    "constant": Constant,
    "SBDM": SBDM,
    "sigma": Sigma,
    "linear": Linear,
    "decreasing": Decreasing,
    "increasing-decreasing": IncreasingDecreasing,
    "inccreasing-decreasing": IncreasingDecreasing,  # the spelling of SiT's code
}


def diffusion_form(name: str, norm: float = 1.0) -> Diffusion:
    """The diffusion that SiT's codes and papers call so.

    Raises:
        UserError: when there is none of that name; the line gives the nearest.
    """
    if name not in FORMS:
        raise unknown_choice("sampler.diffusion", name, FORMS, "diffusion form")
    return FORMS[name](norm)
