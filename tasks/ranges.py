"""Numbers outside every sensible range, by the name of the option: the same name means the same thing everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from repalign.errors import UserError

_AT_LEAST_1 = frozenset(
    "accumulate batch_size bucket_step channels chunk codes columns depth devices dim downsampling encoder_depth every "
    "expansion grid groups head_dim heads hidden image_size input_size layers length log_every_n_steps max_steps "
    "mlp_ratio neighbors num_classes num_nodes num_samples objects object_classes order patch patience rank rungs "
    "splits steps subset_size subsets table_side".split()
)
_AT_LEAST_0 = frozenset(
    "draws eps eta gradient_clip_val latent_noise lr num_workers seed start warmup weight weight_decay "
    "variational_weight perceptual_weight transformer_depth".split()
)
_ABOVE_0 = frozenset("std temperature shift width bucket_ratio time_scale".split())
_FRACTIONS = frozenset("decay drop dropout ema_decay momentum original probability".split())
# The tables speak of the project's objects and of torch.optim; these parts hold other people's numbers.
_ELSEWHERE = ("reference", "overrides")


def check_ranges(plain: Mapping[str, Any]) -> None:
    """Every number of a configuration whose name has a range.

    Args:
        plain: the configuration in plain containers, interpolations not resolved.

    Raises:
        UserError: naming the key, what was found and the range.
    """
    for part, node in plain.items():
        if part not in _ELSEWHERE:
            _check(node, str(part), str(part))


def _check(node: Any, key: str, name: str) -> None:
    if isinstance(node, dict):
        for inner, value in node.items():
            _check(value, f"{key}.{inner}", str(inner))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _check(value, f"{key}[{index}]", "")
            if name == "betas" and isinstance(value, (int, float)) and not 0 <= value < 1:
                raise UserError(f"{key}[{index}]: expected a number in [0, 1), found {value}")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        wanted = _broken(name, node)
        if wanted:
            raise UserError(f"{key}: expected {wanted}, found {node}")


def _broken(name: str, value: float) -> str:
    """The range in words when the value is outside; '' when it is inside, or the name has none."""
    known = name in _AT_LEAST_1 | _AT_LEAST_0 | _ABOVE_0 | _FRACTIONS
    if known and not math.isfinite(value):
        return "a finite number"
    if name in _AT_LEAST_1 and value < 1 and not (name == "devices" and value == -1):
        return "1 or more"
    if name in _AT_LEAST_0 and value < 0:
        return "0 or more"
    if name in _ABOVE_0 and value <= 0:
        return "more than 0"
    if name in _FRACTIONS and not 0 <= value <= 1:
        return "a number between 0 and 1"
    return ""
