"""The diagonal Gaussian that a KL autoencoder's encoder describes by its moments."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from repalign.nn.precision import at_least_float32
from repalign.state import Gaussian

# Of the variational autoencoder of LDM: keeps exp() and its gradient finite.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def from_log_variance(moments: Float[Tensor, "b two_c h w"]) -> Gaussian:
    """Moments [mean, log variance] along the channels: std = exp(0.5 clamp(logvar, -30, 20)).

    This is what the encoders of LDM, SD and SD3 return (Rombach et al., arXiv:2112.10752, appendix G). In float32 at
    least, whatever the autocast precision of the encoder: bfloat16 has three digits, and KL takes the logarithm again.
    """
    mean, log_variance = at_least_float32(moments).chunk(2, dim=1)
    return Gaussian(mean, (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp())


def from_std(moments: Float[Tensor, "b two_c h w"]) -> Gaussian:
    """Moments [mean, standard deviation] along the channels: what the latent files of REPA store (arXiv:2410.06940)."""
    mean, std = moments.chunk(2, dim=1)
    return Gaussian(mean, std)
