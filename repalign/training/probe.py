"""What a trained backbone's hidden states know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.metrics.alignment import cknna
from repalign.protocols import Autoencoder, Backbone, Conditioner, Encoder, Path, StreamSource
from repalign.random import SampleRandom
from repalign.state import Tokens, leading
from repalign.training.step import Batch, features_of, state_of


@torch.no_grad()
def alignment_of_taps(
    taps: Sequence[str],
    encoder: str,
    batches: Iterable[Batch],
    *,
    backbone: Backbone,
    path: Path,
    conditioner: Conditioner,
    autoencoder: Autoencoder,
    encoders: Mapping[str, Encoder],
    streams: Mapping[str, StreamSource] | None = None,
    t: float = 0.5,
    neighbors: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """CKNNA of hidden states on noisy latents with an encoder's features of the clean pictures, by tap.

    As REPA measures it (arXiv:2410.06940, figure 2; its issue 24): all latents at one time, the null condition, no
    head, and every representation averaged over its grid tokens. The value depends on the number of pictures.

    Args:
        taps: names of hidden states of the backbone.
        encoder: name of an encoder.
        batches: with serial numbers, and pictures or cached latents and features; together the pictures compared.
        backbone: in evaluation mode.
        path: between data and noise.
        conditioner: gives the null condition.
        autoencoder: gives the latents.
        encoders: by name.
        streams: what is diffused beside the latent; where it comes from this encoder, the backbone sees the features
            themselves, noised, and the value says less.
        t: time of the latents, in the house's direction.
        neighbors: see :func:`repalign.metrics.alignment.cknna`.
        seed: of the noise.

    Raises:
        UserError: for a tap that does not exist, or too few pictures.
    """
    students: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    targets: list[Tensor] = []
    for batch in batches:
        label = batch["label"]
        random = SampleRandom(seed, batch["serial"].tolist(), label.device)
        x_0 = state_of(batch, autoencoder, encoders, streams or {}, random)
        times = torch.full((len(label),), t, device=leading(x_0).device)
        x_t = path.sample(x_0, random.normal_like("eps", x_0), times).x_t
        output = backbone(x_t, times, conditioner.null(len(label), label.device), taps=taps, only_taps=True)
        for tap in taps:
            students[tap].append(pooled(output.taps[tap]))
        targets.append(pooled(features_of(batch, encoders)(encoder)))
    return {tap: cknna(torch.cat(found), torch.cat(targets), neighbors) for tap, found in students.items()}


def pooled(tokens: Tokens) -> Float[Tensor, "b d"]:
    """Mean over the grid tokens, in float32."""
    return tokens.patches.data.float().mean(1)
