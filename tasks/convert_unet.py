"""task=convert for U-Nets: which adapter suits a composition, and the weights of its conditioner."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig
from torch import nn

from lightning_modules.generative import Generative
from repalign.backbones.clocks import unwrapped
from repalign.backbones.unet import UNet
from repalign.checkpoints.unet import LDMUNetAdapter
from repalign.conditioners.label_token import LabelTokenConditioner
from repalign.conditioners.maps import SemanticMapConditioner
from repalign.errors import UserError

# LDM's names of a conditioner's weights.
STAGES: Mapping[type, Mapping[str, str]] = {
    LabelTokenConditioner: {"embedding.weight": "cond_stage_model.embedding.weight"},
    SemanticMapConditioner: {"rescale.mix.weight": "cond_stage_model.channel_mapper.weight"},
}


def unet_of(module: Generative) -> UNet:
    """The U-Net of a composition.

    Raises:
        UserError: when its backbone is another.
    """
    network = unwrapped(module.backbone)
    if not isinstance(network, UNet):
        raise UserError(
            f"task.family: is for U-Nets, found {type(network).__name__}; choose experiment=ldm_f4 or another"
        )
    return network


def conditioner_of(module: Generative) -> dict[str, nn.Module]:
    """The conditioner as a part, where it has weights."""
    conditioner = module.conditioner
    return {"conditioner": conditioner} if isinstance(conditioner, nn.Module) and conditioner.state_dict() else {}


def ldm_adapter(module: Generative, task: DictConfig) -> LDMUNetAdapter:
    """Between LDM's checkpoints and a composition with a U-Net.

    Raises:
        UserError: when the conditioner has weights that LDM has no names for.
    """
    network, conditioner = unet_of(module), module.conditioner
    if conditioner_of(module) and type(conditioner) not in STAGES:
        raise UserError(
            f"task.family: LDM has no names for the weights of {type(conditioner).__name__}; checkpoints of our own "
            "training hold them, and family unet_diffusers converts the U-Net alone"
        )
    stage = STAGES.get(type(conditioner), {})
    return LDMUNetAdapter(network, task.weights == "ema", "model.diffusion_model.", stage=stage)
