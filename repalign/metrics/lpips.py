"""LPIPS: a perceptual distance between pictures, as a loss and as a metric."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from repalign.errors import UserError, nearest
from repalign.reading import read_torch

VGG_KEY, HEADS_KEY = "paths.vgg16", "paths.lpips"
RANDOM = "random"
VGG_FILE = "vgg16-397923af.pth"
# Behind relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of torchvision's VGG16, and their widths.
STOPS = (3, 8, 15, 22, 29)
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_log = logging.getLogger(__name__)


def lpips_distance(
    first: Sequence[Float[Tensor, "b ? ? ?"]],
    second: Sequence[Float[Tensor, "b ? ? ?"]],
    heads: Sequence[Float[Tensor, " ?"]],
    eps: float = 1e-10,
) -> Float[Tensor, " b"]:
    """sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2 with features a, b divided by their norm over channels (plus eps).

    Args:
        first: features [B, C_l, H_l, W_l] of one batch of pictures, layer by layer.
        second: those of the other.
        heads: weights [C_l] of each layer.
        eps: added to the norm.
    """
    distance = torch.zeros(len(first[0]), device=first[0].device)
    for a, b, head in zip(first, second, heads, strict=True):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + eps) for x in (a, b))
        distance = distance + torch.einsum("bchw,c->bhw", (a - b).square(), head).mean((1, 2))
    return distance


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity on VGG16 (Zhang et al., arXiv:1801.03924), calibrated linear heads.

    Always in evaluation mode, in float32 (float64 where its weights are); gradients pass to the pictures. Nothing is
    downloaded.

    Args:
        vgg: ImageNet weights of torchvision's VGG16 (``vgg16-397923af.pth``); None looks where torch.hub keeps them;
            'random' for an untrained network.
        heads: the linear heads (``vgg.pth`` of LPIPS 0.1); None takes those inside torchmetrics; 'random' for untrained
            ones.
        double_scaling: map x to 2x - 1 first, although x is in [-1, 1] already. REPA-E's official code did so until its
            pull request 17, and its published numbers are from before; False is what LPIPS means.

    Raises:
        UserError: when a file is missing, unreadable or another one.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, vgg: str | Path | None = None, heads: str | Path | None = None, double_scaling: bool = False
    ) -> None:
        super().__init__()
        self.double_scaling = double_scaling
        self.features = make_layers(cfgs["D"])[: STOPS[-1] + 1]
        self.heads = nn.ParameterList(torch.rand(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1), persistent=False)
        if vgg == RANDOM or heads == RANDOM:
            _log.warning("LPIPS has random weights; its values mean nothing")
        if vgg != RANDOM:
            self._fill_features(_standard_vgg() if vgg is None else Path(vgg).expanduser())
        if heads != RANDOM:
            self._fill_heads(_standard_heads() if heads is None else Path(heads).expanduser())
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode."""
        return super().train(False)

    def scaled(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """What VGG16 sees of pictures in [-1, 1]."""
        signed = 2 * signed - 1 if self.double_scaling else signed
        return (signed - self.shift) / self.scale

    def forward(self, first: Float[Tensor, "b 3 h w"], second: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of two batches of pictures in [-1, 1]; 0 for equal ones."""
        with torch.autocast(first.device.type, enabled=False):
            # Pictures in float32 would round the gradient of a training in float64.
            wide = torch.promote_types(self.scale.dtype, torch.float32)
            a, b = (self._layers(self.scaled(x.to(wide))) for x in (first, second))
            return lpips_distance(a, b, list(self.heads))

    def _layers(self, x: Tensor) -> list[Tensor]:
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in STOPS:
                found.append(x)
        return found

    def _fill_features(self, file: Path) -> None:
        held = _read(file, VGG_KEY, "REPALIGN_VGG16", f"{VGG_FILE}, torchvision's ImageNet weights of VGG16")
        wanted = {f"features.{name}": value.shape for name, value in self.features.state_dict().items()}
        _check(wanted, {name: value.shape for name, value in held.items()}, file, VGG_KEY)
        self.features.load_state_dict({name.removeprefix("features."): held[name] for name in wanted})

    def _fill_heads(self, file: Path) -> None:
        held = _read(file, HEADS_KEY, "REPALIGN_LPIPS", "vgg.pth of LPIPS 0.1, which comes with torchmetrics")
        wanted = {f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in enumerate(WIDTHS)}
        _check(wanted, {key: tuple(value.shape) for key, value in held.items()}, file, HEADS_KEY)
        for head, key in zip(self.heads, wanted, strict=True):
            head.data = held[key].float().flatten()


def _standard_vgg() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _standard_heads() -> Path:
    found = importlib.util.find_spec("torchmetrics")
    assert found is not None and found.origin is not None, "torchmetrics is installed with the extra 'eval'"
    return Path(found.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"


def _read(file: Path, key: str, variable: str, what: str) -> dict[str, Tensor]:
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(
            f"{key}: no file '{file}'.{nearest(file.name, beside)} Expected {what}; put it there, or set "
            f"its path by the environment variable {variable}"
        )
    try:
        return dict(read_torch(file))
    except Exception as error:  # the reader raises many kinds; to the person they are one
        raise UserError(f"{key}: '{file}' cannot be read ({type(error).__name__}); expected {what}") from error


def _check(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], file: Path, key: str) -> None:
    for name, shape in expected.items():
        if tuple(found.get(name, ())) != tuple(shape):
            raise UserError(
                f"{key}: '{file}' is another file: '{name}' is {list(found.get(name, ())) or 'absent'} in "
                f"it, expected {list(shape)}"
            )
