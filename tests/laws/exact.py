"""Networks whose predictions are known exactly: Gaussian data, or a single point."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from repalign.paths.angular import AngularVelocity
from repalign.paths.gvp import GVPPath
from repalign.paths.interpolant import Interpolant, scale
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Noise, Quantity, Score, Velocity
from repalign.paths.vp import DiscreteVPPath, VPPath
from repalign.samplers.field import DenoisingField
from repalign.state import Cond, Output, PathSample, State, leading, map_state

PATHS = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath(), "ddpm": DiscreteVPPath()}
QUANTITIES = {"velocity": Velocity(), "noise": Noise(), "data": Data(), "score": Score(), "angular": AngularVelocity()}


class GaussianNetwork(nn.Module):
    """The best prediction for data N(mean, std^2); mean and, with labels, mean + label.

    E[x_0 | x_t] = mean + alpha std^2 / var (x_t - alpha mean) and E[eps | x_t] = sigma / var (x_t - alpha mean) with
    var = alpha^2 std^2 + sigma^2. It notes the batch size and the time of every call. With ``variance_head`` its head
    ``variance`` is tanh of the state.
    """

    tap_specs: dict[str, Any] = {}

    def __init__(
        self,
        path: Interpolant,
        quantity: Quantity,
        mean: float = 0.5,
        std: float = 0.5,
        dtype: torch.dtype = torch.float64,
        variance_head: bool = False,
        uses_carry: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.quantity = path, quantity
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.std = std
        self.variance_head = variance_head
        self.uses_carry = uses_carry
        self.calls: list[tuple[int, float]] = []

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
        size = len(leading(x_t))
        self.calls.append((size, float(t[0])))
        c = self.path.coefficients(t)
        mean = self.mean.expand(size) if cond.label is None else self.mean + cond.label.to(self.mean)
        variance = c.alpha**2 * self.std**2 + c.sigma**2

        def centre(x: Tensor) -> Tensor:
            return mean.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)

        deviation = map_state(lambda x: x - scale(c.alpha, centre(x)), x_t)
        x_0 = map_state(centre, x_t) + scale(c.alpha * self.std**2 / variance, deviation)
        eps = scale(c.sigma / variance, deviation)
        # Every target is linear in x_0 and eps, so that its mean is the target of their means.
        pred = self.quantity.target(PathSample(x_t, t, x_0, eps, c))
        heads = {"variance": map_state(torch.tanh, x_t)} if self.variance_head else {}
        return Output(pred, heads, carry=size if self.uses_carry else None)


def exact_field(path: Interpolant, quantity: Quantity, cond: Cond | None = None, **options: Any) -> DenoisingField:
    """A field around a :class:`GaussianNetwork`."""
    network = GaussianNetwork(path, quantity, **options).requires_grad_(False)
    return DenoisingField(network, path, quantity, cond or Cond())


class Generated:
    """Ordinary random numbers instead of one stream per sample: quick for large batches."""

    def __init__(self, batch: int, stage: int = 0) -> None:
        self.batch, self.stage = batch, stage

    def at(self, stage: int) -> Generated:
        return Generated(self.batch, stage)

    def normal_like(self, name: str, state: Tensor) -> Tensor:
        return torch.randn(state.shape, dtype=state.dtype, generator=torch.Generator().manual_seed(self.stage))
