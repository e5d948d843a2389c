"""Hidden states of a trained backbone on noisy latents, for probing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.protocols import Backbone, Conditioner, Path
from repalign.random import SampleRandom
from repalign.state import State, Tokens, leading, map_state


@torch.no_grad()
def tap_tokens(
    taps: Sequence[str],
    x_0: State,
    serials: Sequence[int],
    t: float,
    *,
    backbone: Backbone,
    path: Path,
    conditioner: Conditioner,
    batch_size: int = 64,
    seed: int = 0,
) -> Iterator[Mapping[str, Tokens]]:
    """Hidden states by name, batch by batch, as REPA probes them (arXiv:2410.06940, figure 2).

    All latents are at one time; the condition is the null condition, so that no class is told.

    Args:
        taps: names of hidden states of the backbone.
        x_0: normalised latents, or several streams.
        serials: number of each sample, which its noise is drawn by.
        t: time, in the house's direction.
        backbone: in evaluation mode.
        path: between data and noise.
        conditioner: gives the null condition.
        batch_size: samples at once.
        seed: of the noise.
    """
    device = leading(x_0).device
    for start in range(0, len(serials), batch_size):
        part = slice(start, start + batch_size)
        own = map_state(lambda stream, part=part: stream[part], x_0)
        random = SampleRandom(seed, serials[part], device)
        times = torch.full((random.batch,), t, device=device)
        x_t = path.sample(own, random.normal_like("eps", own), times).x_t
        yield backbone(x_t, times, conditioner.null(random.batch, device), taps=taps, only_taps=True).taps


def pooled_taps(batches: Iterator[Mapping[str, Tokens]]) -> dict[str, Float[Tensor, "n d"]]:
    """Mean over the grid tokens of each hidden state, all batches together, float32 on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for taps in batches:
        for tap, tokens in taps.items():
            found.setdefault(tap, []).append(tokens.patches.data.float().mean(1).cpu())
    return {tap: torch.cat(parts) for tap, parts in found.items()}


def principal_colours(tokens: Tokens, share: float = 0.01) -> Float[Tensor, "b 3 h w"]:
    """The first three principal components of grid tokens as red, green and blue in [0, 1], over all pictures at once.

    Args:
        tokens: [B, N, D] on a grid.
        share: of the values at either end that are cut, so that single tokens do not dim all others.
    """
    assert tokens.grid is not None, "a picture needs a grid"
    rows = tokens.patches.data.float().flatten(0, 1).cpu()
    rows = rows - rows.mean(0)
    _, _, components = torch.linalg.svd(rows, full_matrices=False)
    # The sign of a component is arbitrary: the largest entry of each is made positive, so that runs look alike.
    signs = torch.sign(components[:3].gather(1, components[:3].abs().argmax(1, keepdim=True)))
    colours = rows @ (components[:3] * signs).T
    low, high = colours.quantile(share, dim=0), colours.quantile(1 - share, dim=0)
    colours = ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    height, width = tokens.grid
    return colours.reshape(-1, height, width, 3).permute(0, 3, 1, 2)
