"""LDM's helpers of conditioning, its patch-wise weights and its average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repalign.conditioners.maps import SpatialRescaler, resized_mask
from repalign.nn.patches import Crops
from repalign.training.ema import EMA
from tests.golden.runner import Case, kind, only_keys

FACTOR = 4  # of the latent in the case's procedure: two halvings


class _Weight(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.p = nn.Parameter(value.clone())


@kind("ldm.conditioning_ema_patches")
def conditioning_ema_patches(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("patch", "ema_decay"))
    only_keys(config["patch"], ("ks", "stride", "clip", "tie_clip"), "patch")
    weight = inputs["w"]
    rescaler = SpatialRescaler(weight.shape[1], weight.shape[0], halvings=FACTOR.bit_length() - 1)
    rescaler.mix.load_state_dict({"weight": weight})
    patch, z = config["patch"], inputs["z"]
    crops = Crops(patch["ks"], patch["stride"], tuple(patch["clip"]), tuple(patch["tie_clip"]))
    cut, size = crops.cut(z), z.shape[2:]
    live = _Weight(inputs["p"])
    ema = EMA(live, config["ema_decay"], warmup=True)
    trajectory = []
    for update, row in enumerate(inputs["targets"], start=1):  # LDM counts its updates from 1
        live.p.data.copy_(row)
        ema.update(live, update)
        trajectory.append(ema.module.p.detach().clone())
    mask = inputs["mask"]
    with torch.no_grad():
        return {
            "spatial_rescaler": rescaler(inputs["seg"]),
            "inpaint_mask_latent": resized_mask(mask, (mask.shape[2] // FACTOR, mask.shape[3] // FACTOR)),
            "patch_weighting": crops.weights(*size)[None, None],
            "patch_normalization": crops.total(*size),
            "patch_recombined_of_zsinz_plus_half_z": crops.join(cut * cut.sin() + cut / 2, *size),
            "ema_trajectory": torch.stack(trajectory),
        }
