"""Which times are safe: how far training and sampling stay away from the ends of a path."""

from __future__ import annotations

from dataclasses import dataclass

from repalign.protocols import Parametrization, Path

TRAIN_MARGIN = 1e-5
MARGIN = 1e-3


@dataclass(frozen=True)
class TimeInterval:
    """Times from ``low`` (towards data) to ``high`` (towards noise), within [0, 1]."""

    low: float
    high: float


def time_interval(
    path: Path,
    parametrization: Parametrization,
    *,
    train: bool = False,
    last_step_size: float = 0.0,
    margin: float | None = None,
) -> TimeInterval:
    """The interval of SiT (``check_interval`` of its transport), in the house's time.

    A path that is singular at data (VP) keeps its distance from t = 0 whatever is predicted and reaches t = 1. On the
    other paths a predicted velocity uses all of [0, 1], and a prediction that is converted by a division (noise, score,
    data) keeps its distance from both ends. An SDE ends at ``last_step_size``, where its last step takes over.

    Args:
        path: between data and noise.
        parametrization: what is predicted.
        train: training times of a singular path come as near as 1e-5; all other distances are 1e-3.
        last_step_size: of an SDE; 0 for an ODE, for training, or for an SDE without a last step.
        margin: another distance; a velocity on a path without singularity ignores it, as SiT does.

    Deviation: SiT's default of its sampling margin depends on whether the *training* margin was given; here the
    distances are independent of each other.
    """
    if not path.singular_at_data and not parametrization.divides:
        distance = 0.0
    elif margin is not None:
        distance = margin
    else:
        distance = TRAIN_MARGIN if train and path.singular_at_data else MARGIN
    low = last_step_size if last_step_size > 0 else distance
    return TimeInterval(low, 1.0 if path.singular_at_data else 1.0 - distance)
