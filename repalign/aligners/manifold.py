"""Losses between the relations of student tokens and those of target tokens, [B, N, D] x [B, N, D] -> [B].

With S(x) the matrix of cosines between vectors, each is the mean square of S(target) - S(student), in float32 whatever
the autocast precision. They differ in which vectors are related. Source: the manifold loss of U-REPA
(arXiv:2503.18414). The paper speaks of relations between samples and no official code could be read, so which vectors
it relates is not verified; public re-implementations relate tokens within a sample, or pooled samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repalign.nn.precision import at_least_float32


class IntraManifold:
    """Relations of the tokens of one sample, N x N; independent of the batch and of the number of ranks."""

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return _difference(student, target).mean((1, 2))


class PooledManifold:
    """Relations of the samples of this rank's batch, B x B: each the mean of its normalised tokens, normalised again.

    The entry of sample b is the mean over its row, so the mean over the batch is that over all pairs.
    """

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return _difference(_pooled(student), _pooled(target)).mean(1)


class BatchManifold:
    """Relations of all tokens of this rank's batch, B N x B N: for small batches alone.

    The entry of sample b is the mean over the rows of its tokens.
    """

    def __call__(self, student: Float[Tensor, "b n d"], target: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        squares = _difference(student.flatten(0, 1), target.flatten(0, 1))
        return rearrange(squares, "(b n) m -> b (n m)", b=len(student)).mean(1)


def _pooled(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    return F.normalize(at_least_float32(tokens), dim=-1).mean(1)


def _difference(student: Float[Tensor, "*b n d"], target: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    """Squared differences of the two matrices of cosines."""
    with torch.autocast(student.device.type, enabled=False):
        return (_cosines(at_least_float32(target)) - _cosines(at_least_float32(student))).square()


def _cosines(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n n"]:
    unit = F.normalize(x, dim=-1)
    return unit @ unit.transpose(-1, -2)
