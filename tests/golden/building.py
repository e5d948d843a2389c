"""Pieces that several kinds share: the network from its official config, recorded draws, guidance, gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repalign.backbones.dit import DiT
from repalign.checkpoints.keys import StateDict
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.paths.gvp import GVPPath
from repalign.paths.interpolant import Interpolant
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Noise, Quantity, Score, Velocity
from repalign.paths.vp import VPPath
from repalign.protocols import Backbone, Field, Guidance, Path
from repalign.samplers.field import DenoisingField
from repalign.state import Cond, State, StateShape, Streams
from tests.golden.runner import only_keys

# Official names of paths and predictions: SiT's, and REPA's `path_type`.
PATHS: Mapping[str, Callable[[], Interpolant]] = {
    "Linear": LinearPath,
    "GVP": GVPPath,
    "VP": VPPath,
    "linear": LinearPath,
    "cosine": GVPPath,
}
PREDICTIONS: Mapping[str, Callable[[], Quantity]] = {
    "velocity": Velocity,
    "noise": Noise,
    "score": Score,
    "data": Data,
}
NETWORK_KEYS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
    "qk_norm",
    "class_dropout_prob",  # of training alone; the null row of the embedding is always there
)


def build_network(
    config: Mapping[str, Any],
    state: StateDict,
    extra_keys: Sequence[str] = (),
    streams: Callable[[tuple[int, int, int]], StateShape] | None = None,
    **options: Any,
) -> DiT:
    """The transformer of DiT, SiT and REPA with imported weights, in evaluation mode; ``options`` are ours.

    ``learn_sigma`` is the officials' switch for a variance half in the output; REPA has none. ``streams`` makes the
    shapes of several streams from that of the network's input.
    """
    only_keys(config, (*NETWORK_KEYS, *extra_keys), "config of the network")
    size = config["input_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config["in_channels"], height, width)
    network = DiT(
        latent_shape=shape if streams is None else streams(shape),
        num_classes=config["num_classes"],
        patch=config["patch_size"],
        dim=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qk_norm=config.get("qk_norm", False),
        variance_head=config.get("learn_sigma", False),
        **options,
    )
    network.load_state_dict(state)
    return network.eval()


@dataclass(frozen=True)
class RecordedRandom:
    """Draws from a record instead of a generator (protocol ``Randomness``).

    Attributes:
        batch: number of samples.
        draws: tensors by stream name, [batch, ...].
        staged: by stream name, one tensor per stage: [stages, batch or more, ...].
    """

    batch: int
    draws: Mapping[str, Tensor]
    staged: Mapping[str, Tensor]
    stage: int = 0

    def at(self, stage: int) -> RecordedRandom:
        return replace(self, stage=stage)

    def uniform(self, name: str) -> Tensor:
        return self.staged[name][self.stage] if name in self.staged else self.draws[name]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self.draws[name]

    def normal(self, name: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        record = self.staged[name][self.stage][: self.batch] if name in self.staged else self.draws[name]
        assert record.shape == (self.batch, *shape), (
            f"stream {name}: recorded {list(record.shape)}, asked {list(shape)}"
        )
        return record.to(dtype)

    def normal_like(self, name: str, state: State) -> State:
        if isinstance(state, Streams):
            return Streams({k: self.normal(f"{name}/{k}", v.shape[1:], v.dtype) for k, v in state.items()})
        return self.normal(name, state.shape[1:], state.dtype)


def recorded_noise(noise: Tensor, batch: int) -> RecordedRandom:
    """The noise of a sampler, [steps, batch or more, ...]; rows beyond the batch are those of a doubled batch."""
    return RecordedRandom(batch, {}, {"noise": noise})


def guided_field(
    backbone: Backbone,
    path: Path,
    parametrization: Quantity,
    label: Tensor,
    null: Tensor,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Field:
    """A field at labels; guided when scale > 1, the condition of all three official codes."""
    guidance = ClassifierFreeGuidance(scale, interval, channels) if scale > 1 else NoGuidance()
    return field_under(guidance, backbone, path, parametrization, label, null)


def field_under(
    guidance: Guidance, backbone: Backbone, path: Path, parametrization: Quantity, label: Tensor, null: Tensor
) -> Field:
    """A field at labels under a guidance."""

    def bind(cond: Cond) -> Field:
        return DenoisingField(backbone, path, parametrization, cond)

    return guidance(bind, Cond(label=label), Cond(label=null))


def collect_gradients(module: nn.Module, of: Tensor) -> dict[str, Tensor]:
    """Gradients of a scalar by the module's parameter names; zeros where it does not depend on one."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(of, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }
