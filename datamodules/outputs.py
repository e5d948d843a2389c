"""What frozen networks say of pictures and captions, in the form in which it is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.own_store import MOMENTS
from repalign.errors import UserError
from repalign.protocols import Autoencoder, Encoder

Compute = Callable[[Any], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Outputs:
    """The outputs of one frozen network over a data set.

    Attributes:
        name: 'latents', 'features_<encoder>' or 'text_<encoder>': name of the store and of the progress bar.
        network: the network.
        fingerprint: stands for everything that the outputs depend on (network, weights, preprocessing).
        compute: images [B, 3, H, W] in [0, 1] on the CPU, or a list of B captions -> arrays [B, ...] by name.
        dtype: in which floating-point values are stored, 'float32' or 'float16'.
        option: the configuration key that sets ``dtype``.
        of_captions: whether ``compute`` takes captions.
    """

    name: str
    network: Any
    fingerprint: str
    compute: Compute
    dtype: str
    option: str
    of_captions: bool = False


def outputs_of(
    autoencoder: Autoencoder | None,
    encoders: Mapping[str, Encoder],
    text_encoders: Mapping[str, Any],
    device: torch.device | str,
    latent_dtype: str,
    feature_dtype: str,
) -> list[Outputs]:
    """One entry per network: latents, features of pictures, features of captions.

    Raises:
        UserError: when a network has no ``fingerprint``.
    """
    found = []
    if autoencoder is not None:
        compute = partial(_moments, autoencoder, device)
        mark = _fingerprint("data.cache_latents", autoencoder)
        found.append(Outputs("latents", autoencoder, mark, compute, latent_dtype, "data.latent_dtype"))
    for kind, networks, function in (("features", encoders, _features), ("text", text_encoders, _text)):
        for name, network in networks.items():
            compute = partial(function, name, network, device)
            mark = _fingerprint("data.cache_features", network)
            found.append(
                Outputs(f"{kind}_{name}", network, mark, compute, feature_dtype, "data.feature_dtype", kind == "text")
            )
    return found


def _fingerprint(option: str, network: Any) -> str:
    found = getattr(network, "fingerprint", None)
    if not found:
        raise UserError(
            f"{option}: {type(network).__name__} has no fingerprint, so what it computes cannot be found again; "
            f"set {option}=false"
        )
    return str(found)


def _moments(autoencoder: Autoencoder, device: torch.device | str, images: Tensor) -> dict[str, Tensor]:
    """One record [B, 1 or 2, C, H, W] per picture, mean and standard deviation: read at once, they cost one access."""
    with torch.no_grad():
        posterior = autoencoder.encode(images.to(device))
    if not isinstance(posterior.mean, Tensor):
        raise UserError("data.cache_latents: latents of several streams are not stored; set data.cache_latents=false")
    parts = [posterior.mean] if posterior.std is None else [posterior.mean, posterior.std]
    return {MOMENTS: torch.stack(parts, 1)}


def _features(name: str, encoder: Encoder, device: torch.device | str, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {f"features/{name}": encoder(images.to(device)).data}


def _text(name: str, encoder: Any, device: torch.device | str, captions: Sequence[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        found = encoder(captions)
    arrays = {f"text/{name}": found.data, f"text_mask/{name}": found.mask}
    return arrays if found.pooled is None else {**arrays, f"text_pooled/{name}": found.pooled}


@contextmanager
def placed(network: Any, device: torch.device | str) -> Iterator[None]:
    """A network on the device and in evaluation mode; afterwards where and how it was."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if first is None:
        yield
        return
    modes = {part: part.training for part in network.modules()}
    origin = first.device
    network.to(device).eval()
    try:
        yield
    finally:
        network.to(origin)
        for part, mode in modes.items():
            part.training = mode
