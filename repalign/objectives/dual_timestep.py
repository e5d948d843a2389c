"""Tokens of one image at two or more noise levels."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.protocols import Backbone, Parametrization, Path, Randomness, TimeSampler
from repalign.state import Cond, Draw, State, Step, leading


class DualTimestep:
    """Denoising loss of an image whose tokens are in K random groups, each at its own time (DTS, arXiv:2607.02508).

    A random permutation cuts the N tokens into groups of about ratio_k N tokens; group k gets the time t_k; loss = mean
    over all tokens of |pred - target|^2. With ``separate`` tokens attend to their own group alone (attention
    separation, AS), so that clean tokens cannot be copied into noisy ones. The draw holds t [B, K] and the group of
    each token, [B, N]. Of a state of several streams all maps share their tokens' times.

    Args:
        path: between data and noise, with times for each token (:class:`repalign.paths.tokens.TokenPath`).
        parametrization: what the backbone predicts.
        time_sampler: of every group's time; group k draws at stage k of the streams.
        patch: patch size of the backbone.
        ratios: share of the tokens of each group; they add up to 1.
        separate: whether attention is separated.

    Raises:
        UserError: for ratios that do not add up to 1.
    """

    times = "group"

    def __init__(
        self,
        path: Path,
        parametrization: Parametrization,
        time_sampler: TimeSampler,
        patch: int,
        ratios: Sequence[float] = (0.25, 0.75),
        separate: bool = True,
    ) -> None:
        if min(ratios) < 0 or not math.isclose(sum(ratios), 1, abs_tol=1e-6):
            raise UserError(f"objective.ratios: expected shares that add up to 1, found {list(ratios)}")
        self.denoising = Denoising(path, parametrization, time_sampler)
        self.time_sampler = time_sampler
        self.patch = patch
        self.ratios = tuple(ratios)
        self.separate = separate

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """Noise from ``eps``, the permutation from ``groups``, the time of group k from stage k of the time sampler."""
        height, width = leading(x_0).shape[-2:]
        tokens = height * width // self.patch**2
        order = random.normal("groups", (tokens,)).argsort(1)
        sizes = group_sizes(self.ratios, tokens)
        # Filled on the device: a table from the host would make every step wait for it.
        sorted_ids = torch.cat([order.new_full((size,), k) for k, size in enumerate(sizes)])
        groups = torch.empty_like(order).scatter_(1, order, sorted_ids.expand_as(order))
        t = torch.stack([self.time_sampler(random.at(k)) for k in range(len(sizes))], 1)
        return Draw(t=t, eps=random.normal_like("eps", x_0), groups=groups)

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
        """One pass of the backbone at the times of the tokens."""
        assert draw.t is not None and draw.groups is not None, "this objective's own draw has times and groups"
        if self.separate:
            cond = replace(cond, groups=draw.groups)
        each = replace(draw, t=draw.t.gather(1, draw.groups))
        return self.denoising(backbone, x_0, cond, each, taps=taps, only_taps=only_taps)


def group_sizes(ratios: Sequence[float], tokens: int) -> list[int]:
    """floor(ratio * tokens) for each group; what is left goes to the largest remainders, earlier groups first."""
    exact = [ratio * tokens for ratio in ratios]
    sizes = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: sizes[k] - exact[k])
    for k in by_remainder[: tokens - sum(sizes)]:
        sizes[k] += 1
    return sizes
