"""MCG-NJU/DDT: the decoupled transformer and its REPA trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.diffusion import DiffusionModule
from repalign.aligners.similarities import CosineDistance
from repalign.backbones.clocks import unwrapped
from repalign.backbones.ddt import DDT
from repalign.checkpoints.ddt import LIVE, PROJECTOR, DDTAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.paths.linear import LinearPath
from repalign.state import Draw
from tasks.peers.loading import Drawn, import_from
from tasks.peers.peer import Peer, Terms, dropped, only_head, require, require_velocity, widths_of

NAME, RECIPE = "MCG-NJU/DDT", "ddt_b"
FILES = (
    "src/models/denoiser/decoupled_improved_dit.py",
    "src/diffusion/stateful_flow_matching/training_repa.py",
)


class Given(nn.Module):
    """In the place of the official encoder, which is loaded from the net: what comes as pictures are its tokens."""

    def __init__(self, weight_path: str | None = None) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class DDTPeer(Peer):
    """DDT's step: both losses, AdamW with betas (0.9, 0.95), an average of all tensors at once, no clipping."""

    name = NAME
    sign = -1.0
    betas = (0.9, 0.95)

    def __init__(self, network: Any, trainer: Any, adapter: DDTAdapter, null: int, device: torch.device) -> None:
        self.trainer = trainer.to(device)
        self.null = null
        super().__init__(network, adapter.to_official, device)

    def parameters(self) -> Sequence[nn.Parameter]:
        return [*self.trainer.parameters(), *self.network.parameters()]

    def named(self) -> Mapping[str, nn.Parameter]:
        network = {LIVE + name: p for name, p in self.network.named_parameters()}
        return network | {PROJECTOR + name: p for name, p in self.trainer.proj[0].named_parameters()}

    def losses(self, x_0: Tensor, label: Tensor, features: Tensor | None) -> tuple[Terms, Tensor]:
        # The official step writes the null class into the labels that it is given.
        found = self.trainer(self.network, None, features, x_0, label.clone(), torch.full_like(label, self.null))
        return {"denoising": found["fm_loss"], "align": found["cos_loss"]}, found["loss"]

    def draws(self, draw: Draw) -> list[Drawn]:
        assert isinstance(draw.eps, Tensor) and draw.t is not None
        return [(torch.rand, dropped(draw)), (torch.rand, 1 - draw.t), (torch.randn_like, draw.eps)]

    @torch.no_grad()
    def follow(self, decay: float = 0.9999) -> None:
        mean: list[Tensor] = [*self.average.parameters()]
        live: list[Tensor] = [*self.network.parameters()]
        torch._foreach_mul_(mean, decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(mean, live, alpha=1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def make(root: Path, module: DiffusionModule) -> DDTPeer:
    """The peer with the composition's sizes and weights.

    Raises:
        UserError: for a composition that DDT does not train, or a checkout that cannot be imported.
    """
    require_velocity(module, NAME, RECIPE, (LinearPath,), reverse=True)
    backbone: Any = unwrapped(module.backbone)
    require(isinstance(backbone, DDT), NAME, "a decoupled transformer", RECIPE)
    aligner_name, aligner, head = only_head(module, NAME, RECIPE)
    cosine = len(aligner.similarities) == 1 and isinstance(aligner.similarities[0][1], CosineDistance)
    require(cosine, NAME, "an aligner by 1 - cosine", RECIPE)
    denoiser, training, scheduling = import_from(
        root,
        "src.models.denoiser.decoupled_improved_dit",
        "src.diffusion.stateful_flow_matching.training_repa",
        "src.diffusion.stateful_flow_matching.scheduling",
    )
    conditioner, shape, blocks = module.conditioner, module.latent_shape, (len(backbone.encoder), len(backbone.decoder))
    assert isinstance(conditioner, LabelConditioner) and isinstance(shape, tuple)
    dim, (hidden, out) = backbone.label_embed.embedding_dim, widths_of(head)
    network = denoiser.DDT(
        in_channels=shape[0],
        num_groups=backbone.encoder[0].attention.heads,
        hidden_size=dim,
        num_blocks=sum(blocks),
        num_encoder_blocks=blocks[0],
        patch_size=backbone.io.patch,
        num_classes=conditioner.num_classes,
    )
    training.DINOv2 = Given
    trainer = training.REPATrainer(
        scheduling.LinearScheduler(),
        feat_loss_weight=float(aligner.weight),
        align_layer=1 + list(backbone.tap_specs).index(aligner.tap),
        proj_denoiser_dim=dim,
        proj_hidden_dim=hidden,
        proj_encoder_dim=out,
        null_condition_p=conditioner.drop,
    )
    adapter = DDTAdapter(shape[0], blocks, [aligner_name])
    return DDTPeer(network, trainer, adapter, conditioner.num_classes, next(backbone.parameters()).device)
