"""How alike the carries of a sampler's steps are, and which steps a dynamic programme chooses for a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repalign.errors import UserError

FORMAT = "repalign similarity"


def step_similarity(states: Float[Tensor, "n b l d"]) -> Float[Tensor, "n n"]:
    """S[i, j]: cosine of the vectors of steps i and j, mean over samples and tokens; float32."""
    unit = F.normalize(states.float(), dim=-1)
    rows = rearrange(unit, "n b l d -> n (b l d)")
    return rows @ rows.T / (states.shape[1] * states.shape[2])


def choose_steps(similarity: Float[Tensor, "n n"], rate: float) -> list[int]:
    """The m = int(n / rate) steps at which a new carry costs least similarity in all (DDT, arXiv:2504.05741).

    Keeping step j's carry until before step i costs e(j, i) = sum_{l = j .. i-1} (1 - S[l, j]). The programme minimises
    the sum over consecutive chosen steps: C_1(i) = e(0, i), C_k(i) = min_{k-1 <= j < i} C_{k-1}(j) + e(j, i), the
    smallest j of equals. Deviation from the paper, whose equations 7 and 8 have inconsistent indices: this is its code.

    Returns:
        The chosen steps in order; the first is 0.

    Raises:
        UserError: when m is below 1 or the rate below 1.
    """
    n = len(similarity)
    m = int(n / rate) if rate > 0 else 0
    if not 1 <= m <= n:
        raise UserError(f"sampler.schedule.rate: expected 1 to the number of evaluations, {n}; found {rate}")
    # error[j, i] for 0 <= j < i <= n, infinite elsewhere.
    error = np.full((n + 1, n + 1), np.inf)
    loss = np.tril(1 - similarity.double().cpu().numpy()).cumsum(axis=0)
    upper = np.triu_indices(n)
    error[upper[0], upper[1] + 1] = loss[upper[1], upper[0]]
    cost = error[0].copy()
    origin: list[np.ndarray] = []
    for k in range(2, m + 1):
        total = cost[:, None] + error
        total[: k - 1] = np.inf
        origin.append(total.argmin(axis=0))  # the first of equals
        cost = total.min(axis=0)
    steps, i = [], n
    for row in reversed(origin):
        i = int(row[i])
        steps.append(i)
    return [0, *reversed(steps)]


def write_similarity(file: Path, similarity: Float[Tensor, "n n"], facts: Mapping[str, Any]) -> None:
    """Keep a measured matrix with what it was measured of (recipe, sampler, samples)."""
    save_file({"similarity": similarity.contiguous()}, file, {"format": FORMAT, "facts": json.dumps(facts)})


def read_similarity(file: Path) -> Float[Tensor, "n n"]:
    """A matrix that :func:`write_similarity` kept.

    Raises:
        UserError: when there is no such file, or it is another one.
    """
    if not file.is_file():
        raise UserError(f"sampler.schedule.similarity: no file '{file}'; measure it with task=sharing")
    try:
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("format") == FORMAT:
                return content.get_tensor("similarity")
    except (SafetensorError, OSError) as error:
        raise UserError(f"sampler.schedule.similarity: '{file}' cannot be read ({error})") from error
    raise UserError(f"sampler.schedule.similarity: '{file}' was not written by task=sharing")
