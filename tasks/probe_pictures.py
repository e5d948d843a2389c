"""Pictures of what a probe found: heat maps over layers and times, principal components of hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from callbacks.pictures import grid_of
from repalign.state import Tokens
from repalign.training.tap_features import principal_colours


def heat_map(
    measure: str, cells: Mapping[tuple[str, float], float], taps: Sequence[str], times: Sequence[float]
) -> Figure:
    """One measure over taps (down) and times (across), the values written in the cells."""
    values = torch.tensor([[cells[tap, t] for t in times] for tap in taps])
    figure = Figure(figsize=(2.2 + 0.62 * len(times), 1.2 + 0.3 * len(taps)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axes)
    axes.set_yticks(range(len(taps)), list(taps))
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    axes.set(xlabel="t (0: data, 1: noise)", title=measure)
    middle = (values.min() + values.max()) / 2
    for row in range(len(taps)):
        for column in range(len(times)):
            value = float(values[row, column])
            colour = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    return figure


def component_grid(
    images: Float[Tensor, "b 3 h w"], encoders: Mapping[str, Tokens], taps: Mapping[str, Tokens]
) -> UInt8[Tensor, "3 y x"]:
    """A row per picture: the picture, then the components of each encoder and of each hidden state as colours."""
    size = (images.shape[-2], images.shape[-1])
    columns = [images.cpu()]
    for tokens in (*encoders.values(), *taps.values()):
        columns.append(F.interpolate(principal_colours(tokens), size=size, mode="nearest"))
    return grid_of(torch.stack(columns, 1).flatten(0, 1), len(columns))
