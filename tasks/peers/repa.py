"""sihyun-yu/REPA: ``models.sit.SiT`` and ``loss.SILoss``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.diffusion import DiffusionModule
from repalign.aligners.similarities import Cosine
from repalign.backbones.dit import DiT
from repalign.checkpoints.repa import REPAAdapter
from repalign.paths.gvp import GVPPath
from repalign.paths.linear import LinearPath
from repalign.state import Draw
from tasks.peers.loading import Drawn, import_from
from tasks.peers.peer import (
    Peer,
    Terms,
    dropped,
    has_norm,
    only_head,
    require,
    require_velocity,
    sizes_of,
    widths_of,
)

NAME, RECIPE = "sihyun-yu/REPA", "repa_sit_s"
FILES = ("models/sit.py", "loss.py")
PATHS = {LinearPath: "linear", GVPPath: "cosine"}


class REPAPeer(Peer):
    """REPA's step: both losses, gradients clipped at 1, AdamW, an average over names, three numbers read a step."""

    name = NAME
    clip = 1.0

    def __init__(self, network: Any, loss: Any, aligner: str, weight: float, device: torch.device) -> None:
        super().__init__(network, REPAAdapter([aligner]).to_official, device)
        self.loss = loss
        self.weight = weight

    def losses(self, x_0: Tensor, label: Tensor, features: Tensor | None) -> tuple[Terms, Tensor]:
        denoising, alignment = self.loss(self.network, x_0, {"y": label}, zs=[features])
        terms = {"denoising": denoising.mean(), "align": alignment.mean()}
        return terms, terms["denoising"] + self.weight * terms["align"]

    def draws(self, draw: Draw) -> list[Drawn]:
        assert isinstance(draw.eps, Tensor) and draw.t is not None
        return [(torch.rand, draw.t), (torch.randn_like, draw.eps), (torch.rand, dropped(draw))]


def make(root: Path, module: DiffusionModule) -> REPAPeer:
    """The peer with the composition's sizes and weights.

    Raises:
        UserError: for a composition that REPA does not train, or a checkout that cannot be imported.
    """
    require_velocity(module, NAME, RECIPE, tuple(PATHS), reverse=False)
    backbone = module.backbone
    fits = isinstance(backbone, DiT) and not getattr(backbone.io, "variance_head", True)
    require(fits, NAME, "a transformer without a variance half", RECIPE)
    assert isinstance(backbone, DiT)
    aligner_name, aligner, head = only_head(module, NAME, RECIPE)
    cosine = len(aligner.similarities) == 1 and isinstance(aligner.similarities[0][1], Cosine)
    require(cosine and aligner.tap.startswith("block."), NAME, "an aligner of a block by the cosine", RECIPE)
    models, loss = import_from(root, "models.sit", "loss")
    path = next(name for kind, name in PATHS.items() if type(module.path) is kind)
    dim, (hidden, out) = backbone.pos_embed.shape[-1], widths_of(head)
    network = models.SiT(
        **sizes_of(backbone, module),
        path_type=path,
        decoder_hidden_size=dim,
        encoder_depth=int(aligner.tap.removeprefix("block.")),
        use_cfg=True,
        z_dims=[out],
        projector_dim=hidden,
        fused_attn=True,
        qk_norm=has_norm(backbone.blocks[0]),
    )
    made = loss.SILoss(prediction="v", path_type=path, weighting="uniform")
    return REPAPeer(network, made, aligner_name, float(aligner.weight), backbone.pos_embed.device)
