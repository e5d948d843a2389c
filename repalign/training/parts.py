"""Whether backbone, objective and aligners go together: asked once, when a training is put together."""

from __future__ import annotations

from collections.abc import Mapping

from repalign.aligners.targets import unwrapped as target_of
from repalign.backbones.clocks import unwrapped
from repalign.errors import UserError
from repalign.protocols import Aligner, Backbone, Objective

PER = {"sample": "one time a sample", "branch": "a time for each branch", "group": "a time for each group of tokens"}
MEND = {
    "sample": "choose an objective with one time a sample (objective=denoising)",
    "branch": "set backbone=deepflow_* clock=native",
    "group": "set backbone=sit_* (aligner=sra_groups where a teacher is wanted)",
}


def check_parts(backbone: Backbone, objective: Objective, aligners: Mapping[str, Aligner]) -> None:
    """The objective's times suit the backbone and every teacher; tokens with times of their own are those of the grid.

    Raises:
        UserError: naming the two parts that do not go together, and why.
    """
    times = getattr(objective, "times", "sample")
    name, inner = type(objective).__name__, unwrapped(backbone)
    network = type(inner).__name__ + ("" if inner is backbone else f" behind {type(backbone).__name__}")
    taken = getattr(backbone, "times", ("sample",))
    if times not in taken:
        raise UserError(
            f"objective and backbone do not go together: {name} has {PER[times]}, {network} takes {_listed(taken)}; "
            f"{MEND[times]}"
        )
    if times == "group" and any(spec.prefix for spec in backbone.tap_specs.values()):
        raise UserError(
            f"objective and token_io do not go together: {name} has {PER[times]} of the grid, but tokens stand before "
            "the grid; set token_io=patch streams=none"
        )
    for key, aligner in aligners.items():
        taken = getattr(target_of(aligner.target), "times", tuple(PER))
        if times not in taken:
            raise UserError(
                f"aligners.{key} and objective do not go together: {name} has {PER[times]}, the teacher's earlier time "
                f"is made for {_listed(taken)}; choose another of aligner=sra, sra_steps, sra_groups"
            )


def _listed(taken: tuple[str, ...]) -> str:
    return " or ".join(PER[kind] for kind in taken)
