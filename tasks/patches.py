"""Large latents, drawn crop by crop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from repalign.backbones.patchwise import Patchwise
from repalign.errors import UserError
from repalign.nn.patches import Crops
from repalign.training.generate import ImageGenerator


def patchwise(generator: ImageGenerator, patches: Mapping[str, Any]) -> ImageGenerator:
    """The generator with a network that sees its latent crop by crop.

    Raises:
        UserError: when the crops do not cover the latent.
    """
    if set(patches) != {"size", "stride"} or not all(isinstance(v, int) and v > 0 for v in patches.values()):
        raise UserError(
            f"task.patches: found {dict(patches)}, expected {{size: 64, stride: 32}}, in latent pixels, or null"
        )
    shape = generator.latent_shape
    if isinstance(shape, Mapping):
        raise UserError("task.patches: latents of several streams are not cut; set task.patches=null")
    crops = Crops(patches["size"], patches["stride"])
    try:
        crops.count(*shape[1:])
    except ValueError as error:
        raise UserError(f"task.patches: {error} (the latent is {shape[1]}x{shape[2]})") from error
    return replace(generator, backbone=Patchwise(generator.backbone, crops))
