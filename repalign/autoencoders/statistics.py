"""What an autoencoder makes of a data set: latent statistics per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.protocols import Autoencoder


@torch.no_grad()
def measure(
    autoencoder: Autoencoder,
    images: Iterable[Float[Tensor, "b 3 h w"]],
    compare: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Statistics of posterior draws.

    mean_c = E[mu], std_c^2 = E[mu^2 + s^2] - mean_c^2 for posteriors N(mu, s^2), over samples and positions, in
    float64.

    Args:
        autoencoder: in evaluation mode.
        images: batches in [0, 1]; all of one size.
        compare: called with every batch and its reconstruction from posterior means, to measure both in one pass
            (:meth:`repalign.metrics.reconstruction.ReconstructionMetrics.update`).

    Returns:
        ``pictures``, ``latent_mean`` and ``latent_std`` (C numbers each), ``posterior_std``.

    Raises:
        ValueError: when there is no picture.
    """
    count, elements = 0, 0
    total = squares = variance = torch.zeros((), dtype=torch.float64)
    for batch in images:
        posterior = autoencoder.encode(batch)
        mean = posterior.mean.double()
        spread = torch.zeros_like(mean) if posterior.std is None else posterior.std.double() ** 2
        total = total + mean.sum((0, 2, 3)).cpu()
        squares = squares + (mean**2 + spread).sum((0, 2, 3)).cpu()
        variance = variance + spread.mean((1, 2, 3)).sum().cpu()
        count += len(batch)
        elements += mean.shape[2] * mean.shape[3] * len(batch)
        if compare is not None:
            compare(batch, autoencoder.decode(posterior.mean))
    if count == 0:
        raise ValueError("autoencoder statistics: the data set has no picture")
    mean = total / elements
    return {
        "pictures": count,
        "latent_mean": mean.tolist(),
        "latent_std": (squares / elements - mean**2).sqrt().tolist(),
        "posterior_std": (variance / count).sqrt().item(),
    }
