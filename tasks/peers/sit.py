"""willisma/SiT: ``models.SiT`` and ``transport``'s loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion import DiffusionModule
from repalign.backbones.clocks import unwrapped
from repalign.backbones.dit import DiT
from repalign.checkpoints.dit import DiTAdapter
from repalign.paths.gvp import GVPPath
from repalign.paths.linear import LinearPath
from repalign.state import Draw
from tasks.peers.loading import Drawn, import_from
from tasks.peers.peer import Peer, Terms, dropped, has_norm, require, require_velocity, sizes_of

NAME, RECIPE = "willisma/SiT", "sit_s"
FILES = ("models.py", "transport/transport.py")
PATHS = {LinearPath: "Linear", GVPPath: "GVP"}


class SiTPeer(Peer):
    """SiT's step: velocity loss, AdamW, an average over names, the loss read after every step, no clipping."""

    name = NAME
    sign = -1.0

    def __init__(self, network: Any, transport: Any, device: torch.device) -> None:
        super().__init__(network, DiTAdapter().to_official, device)
        self.transport = transport

    def losses(self, x_0: Tensor, label: Tensor, features: Tensor | None) -> tuple[Terms, Tensor]:
        loss = self.transport.training_losses(self.network, x_0, {"y": label})["loss"].mean()
        return {"denoising": loss}, loss

    def draws(self, draw: Draw) -> list[Drawn]:
        assert isinstance(draw.eps, Tensor) and draw.t is not None
        return [(torch.randn_like, draw.eps), (torch.rand, 1 - draw.t), (torch.rand, dropped(draw))]


def make(root: Path, module: DiffusionModule) -> SiTPeer:
    """The peer with the composition's sizes and weights.

    Raises:
        UserError: for a composition that SiT does not train, or a checkout that cannot be imported.
    """
    require_velocity(module, NAME, RECIPE, tuple(PATHS), reverse=True)
    backbone = unwrapped(module.backbone)
    fits = isinstance(backbone, DiT) and getattr(backbone.io, "variance_head", False) and not module.aligners
    require(fits, NAME, "a transformer with a variance half, without aligners", RECIPE)
    assert isinstance(backbone, DiT)
    models, transport = import_from(root, "models", "transport")
    first: Any = backbone.blocks[0]
    require(not has_norm(first), NAME, "without a norm of queries and keys", RECIPE)
    network = models.SiT(**sizes_of(backbone, module), learn_sigma=True)
    made = transport.create_transport(next(name for kind, name in PATHS.items() if type(module.path) is kind))
    return SiTPeer(network, made, backbone.pos_embed.device)
