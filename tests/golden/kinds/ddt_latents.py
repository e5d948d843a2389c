"""DDT's cached posteriors behind :mod:`repalign.autoencoders.posterior`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.posterior import from_log_variance
from tests.golden.runner import Case, kind, only_keys


@kind("ddt.cached_latent")
def ddt_cached_latent(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, ["scaling_factor"])
    mean, log_variance, eps = (case.inputs[name] for name in ("mean", "logvar", "eps"))
    # Channels stand third from last, with a batch or without.
    moments = torch.cat([mean, log_variance], dim=-3).reshape(-1, 2 * mean.shape[-3], *mean.shape[-2:])
    latent = from_log_variance(moments).sample(eps.reshape(-1, *mean.shape[-3:])).reshape(mean.shape)
    scaled = ScaleShift(case.config["scaling_factor"]).normalize(latent)
    assert isinstance(scaled, Tensor)
    return {"latent": latent, "latent_scaled": scaled}
