"""How a number was made: a record that travels with it, and a short hash to compare numbers by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from repalign.metrics.suite import FeatureMetrics

# What a score depends on besides the model. Two numbers may be compared when all of these agree.
FIELDS = (
    "features",  # fingerprint of the network: name, weights, preprocessing
    "resize",  # how pictures come to the network's size
    "reference",  # fingerprint of the statistics
    "num_reference",
    "num_samples",
    "labels",  # balanced | uniform | data
    "classes",
    "rounding",  # to 8 bit
    "sampler",
    "guidance",
    "dtype",
    "seed",
    "ema",
)
# The seed moves a number by less than its interval: it is told, and does not make another protocol.
TOLD_ALONE = ("seed",)


def protocol_of(metrics: FeatureMetrics, drawing: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one feature space.

    Args:
        metrics: with its reference set and the pictures taken in.
        drawing: what is known of how the pictures were drawn, by the names of ``FIELDS``; what is missing is null.
    """
    reference = metrics.reference
    known = {
        "features": metrics.fingerprint,
        "resize": getattr(metrics.network, "resize", None),
        "reference": None if reference is None else reference.fingerprint,
        "num_reference": None if reference is None else reference.count,
        "num_samples": metrics.count,
    }
    if reference is None and metrics.captions is not None:
        known["reference"], known["num_reference"] = captions_digest(metrics.captions), len(set(metrics.captions))
    return record_of(known, drawing)


def record_of(known: Mapping[str, Any], drawing: Mapping[str, Any]) -> dict[str, Any]:
    """A record from what is known of a score and of how the pictures were drawn; what is missing is null."""
    return {name: known.get(name, drawing.get(name)) for name in FIELDS}


def captions_digest(captions: Iterable[str]) -> str:
    """Stands for captions in their order."""
    return f"captions-{hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:12]}"


def hash_of(record: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for a protocol, whatever the order of its entries."""
    compared = {name: value for name, value in record.items() if name not in TOLD_ALONE}
    return hashlib.sha256(json.dumps(compared, sort_keys=True, default=str).encode()).hexdigest()[:8]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps two numbers from being compared: ``name: a against b`` for each entry that differs."""
    names = [name for name in {**one, **other} if name not in TOLD_ALONE and one.get(name) != other.get(name)]
    return [f"{name}: {_short(one.get(name))} against {_short(other.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
