"""What an official code's training step is made of."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.diffusion import DiffusionModule
from repalign.aligners.heads import MLPHead
from repalign.backbones.clocks import ReversedClock
from repalign.backbones.dit import DiT
from repalign.checkpoints.keys import StateDict
from repalign.conditioners.label import LabelConditioner
from repalign.errors import UserError
from repalign.nn.token_io import PatchIO
from repalign.objectives.denoising import Denoising
from repalign.paths.parametrization import Velocity
from repalign.state import Draw
from tasks.convert import parts_of
from tasks.peers.loading import Drawn

# Losses by our names (denoising, align), batch means.
Terms = dict[str, Tensor]
Official = Callable[[dict[str, StateDict]], dict[str, Tensor]]


class Peer(ABC):
    """An official model with its loss, its optimizer and its average; the loop around them is the official one's.

    Attributes:
        name: of the repository.
        network: the official model.
        official: from our parts by name to the tensors of :meth:`named`: our weights, or our gradients.
        sign: of its prediction beside ours (-1 where its time runs from noise to data).
        clip: limit of the gradients' norm; None where the official loop has none.
        betas: of AdamW, which the official codes use as PyTorch makes it by default.
        average: a copy of the network that follows it.
    """

    name: str
    sign: float = 1.0
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)

    def __init__(self, network: nn.Module, official: Official, device: torch.device) -> None:
        self.official = official
        self.network = network.to(device).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW([*self.parameters()], lr=1e-4, betas=self.betas, weight_decay=0.0)

    def parameters(self) -> Sequence[nn.Parameter]:
        """What the official loop hands to its optimizer."""
        return [*self.network.parameters()]

    def named(self) -> Mapping[str, nn.Parameter]:
        """Parameters by the keys of official checkpoints."""
        return dict(self.network.named_parameters())

    @torch.no_grad()
    def take_weights(self, module: DiffusionModule) -> None:
        """Our live weights into the official model and its average.

        Raises:
            KeyError: when the official model has a parameter that our key maps do not give.
        """
        states: dict[str, StateDict] = {name: part.state_dict() for name, part in parts_of(module.trained).items()}
        weights = self.official(states)
        for name, parameter in self.named().items():
            parameter.copy_(weights[name].reshape(parameter.shape))
        self.average.load_state_dict(self.network.state_dict())

    @abstractmethod
    def losses(self, x_0: Tensor, label: Tensor, features: Tensor | None) -> tuple[Terms, Tensor]:
        """Losses by our names and their weighted sum, by the official loss, which draws for itself.

        Args:
            x_0: normalised latents [B, C, H, W].
            label: [B], before any is dropped.
            features: tokens [B, N, D] of the frozen encoder, or None.
        """

    @abstractmethod
    def draws(self, draw: Draw) -> list[Drawn]:
        """What the official loss draws, in its order, so that it sees the noise, times and dropped labels of ours."""

    def read(self, terms: Mapping[str, Tensor]) -> None:
        """What the official loop reads on the host after every step; the losses, unless it says otherwise."""
        for value in terms.values():
            value.item()

    @torch.no_grad()
    def follow(self, decay: float = 0.9999) -> None:
        """The average follows, parameter by parameter (REPA, SiT)."""
        live = dict(self.network.named_parameters())
        for name, mean in self.average.named_parameters():
            mean.mul_(decay).add_(live[name].data, alpha=1 - decay)


def dropped(draw: Draw) -> Tensor:
    """Uniform numbers [B] under which a code that drops a label below its probability drops those that ours drops."""
    return 1.0 - draw.drop["label"].float()


def require(holds: bool, name: str, wanted: str, recipe: str) -> None:
    """One line for a composition that an official code does not train.

    Raises:
        UserError: naming the repository, what it trains and a recipe of that kind.
    """
    if not holds:
        raise UserError(
            f"task.peer: {name} trains {wanted}, this composition is another; set experiment={recipe} or so"
        )


def require_velocity(module: DiffusionModule, name: str, recipe: str, paths: Sequence[type], reverse: bool) -> None:
    """The composition must train an unweighted velocity on one of the paths, at class labels.

    Raises:
        UserError: when it does not.
    """
    objective = module.objective
    plain = (
        isinstance(objective, Denoising)
        and isinstance(objective.parametrization, Velocity)
        and objective.weighting is None
        and objective.error is None
        and type(objective.path) in paths
    )
    require(plain, name, f"an unweighted velocity on one of {', '.join(p.__name__ for p in paths)}", recipe)
    clock = "reversed" if reverse else "native"
    require(isinstance(module.backbone, ReversedClock) == reverse, name, f"with clock={clock}", recipe)
    shape = module.latent_shape
    require(isinstance(shape, tuple) and shape[1] == shape[2], name, "one square latent", recipe)
    drops = isinstance(module.conditioner, LabelConditioner) and module.conditioner.drop > 0
    require(drops, name, "class labels, some of which are dropped (conditioner=label)", recipe)


def sizes_of(backbone: DiT, module: DiffusionModule) -> dict[str, Any]:
    """Arguments of the official SiT, which REPA's shares."""
    block: Any = backbone.blocks[0]
    shape, io, conditioner = module.latent_shape, backbone.io, module.conditioner
    assert isinstance(shape, tuple) and isinstance(io, PatchIO) and isinstance(conditioner, LabelConditioner)
    return {
        "input_size": shape[1],
        "patch_size": io.patch,
        "in_channels": shape[0],
        "hidden_size": io.dim,
        "depth": len(backbone.blocks),
        "num_heads": block.attention.heads,
        "mlp_ratio": block.mlp.fc1.out_features / io.dim,
        "class_dropout_prob": conditioner.drop,
        "num_classes": conditioner.num_classes,
    }


def has_norm(block: Any) -> bool:
    """Whether a block normalises queries and keys."""
    return not isinstance(block.attention.q_norm, nn.Identity)


def encoder_of(aligner: Any) -> str:
    """Name of the frozen encoder whose tokens an aligner compares with."""
    target: Any = aligner.target
    return getattr(target, "encoder", None) or target.target.encoder


def only_head(module: DiffusionModule, name: str, recipe: str) -> tuple[str, Any, MLPHead]:
    """Name, aligner and head of the one aligner of a composition.

    Raises:
        UserError: when there are more, or none, or the head is no three-layer projector.
    """
    aligners = list(module.aligners.items())
    one = len(aligners) == 1 and isinstance(aligners[0][1].head, MLPHead)
    require(one, name, "with one aligner and its three-layer head", recipe)
    return aligners[0][0], aligners[0][1], aligners[0][1].head


def widths_of(head: MLPHead) -> tuple[int, int]:
    """Hidden and output width of a projector."""
    first, last = head.layers[0], head.layers[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first.out_features, last.out_features
