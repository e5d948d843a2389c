"""Maps that join the latent's channels: a small picture, a picture with a hole, a semantic map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from repalign.errors import UserError, unknown_choice
from repalign.nn.precision import as_input
from repalign.protocols import Autoencoder, Randomness, TextEncoder
from repalign.random import SampleRandom, on_device
from repalign.state import Cond

METHODS = ("bicubic", "bilinear", "nearest", "area")
Masks = Callable[[Randomness, int, int], Tensor]  # draws, H, W -> [B, 1, H, W], 1 where the picture is missing


class _Map:
    """What these conditioners share: a map has no null condition, guidance and dropout leave it in place."""

    text_encoders: Mapping[str, TextEncoder] = {}
    context_dim = None
    pooled_dim = None

    def null(self, batch: int, device: torch.device) -> Cond:
        """Nothing: the map stays (:meth:`repalign.state.Cond.completed`)."""
        return Cond()

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """No map is dropped."""
        return {}


class LowResolutionConditioner(_Map):
    """Super-resolution: the picture at the latent's size, in [-1, 1], beside the latent (LDM, section 4.4).

    Deviation: LDM degrades by a random chain of blur, noise and JPEG (BSR); here the picture is resampled alone.

    Args:
        autoencoder: whose down-sampling is the factor.
        method: of the resampling: ``bicubic`` or ``bilinear`` (with antialiasing), ``area`` or ``nearest``.

    Raises:
        UserError: for another method, or at a call for a batch without pictures.
    """

    reads = ("image",)
    concat_channels = 3

    def __init__(self, autoencoder: Autoencoder, method: str = "bicubic") -> None:
        if method not in METHODS:
            raise unknown_choice("conditioner.method", method, METHODS, "method")
        self.factor = autoencoder.downsampling
        self.method = method

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """The small picture, [B, 3, H / f, W / f]."""
        images = pictures(batch)
        size = (images.shape[2] // self.factor, images.shape[3] // self.factor)
        antialias = self.method in ("bicubic", "bilinear")
        small = F.interpolate(images, size=size, mode=self.method, antialias=antialias)
        return Cond(spatial=2 * small.clamp(0, 1) - 1)


class InpaintingConditioner(_Map):
    """Inpainting: the latent of the masked picture and the mask beside the latent (LDM, section 4.5).

    The mask is 1 where the picture is missing and becomes -1 or 1, taken at the latent's size by nearest neighbours.
    The masked picture has 0 in [-1, 1] there, its latent is the posterior's mean, normalised as all latents. A batch
    may bring its own ``mask`` [B, 1, H, W]; otherwise it is drawn, as a function of the sample's serial number.

    Args:
        autoencoder: for the masked picture.
        masks: how masks are drawn.
        seed: of the masks.

    Raises:
        UserError: at a call for a batch without pictures.
    """

    reads = ("image",)

    def __init__(self, autoencoder: Autoencoder, masks: Masks | None = None, seed: int = 0) -> None:
        self._autoencoder = (autoencoder,)  # in a tuple, so that no module registers it a second time
        self.concat_channels = autoencoder.channels + 1
        self.masks = masks or random_boxes
        self.seed = seed

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """Latent of the masked picture, then the mask: [B, C + 1, H / f, W / f]."""
        images, mask = pictures(batch), self.mask_of(batch)
        autoencoder = self._autoencoder[0]
        with torch.no_grad():
            raw = autoencoder.encode(0.5 + (1 - mask) * (images - 0.5)).mean
        assert autoencoder.norm is not None, "an autoencoder whose latents are diffused has a norm"
        latent = autoencoder.norm.normalize(raw)
        assert isinstance(latent, Tensor), "an autoencoder gives one stream"
        return Cond(spatial=torch.cat([latent, 2 * resized_mask(mask, (latent.shape[2], latent.shape[3])) - 1], 1))

    def mask_of(self, batch: Mapping[str, Any]) -> Float[Tensor, "b 1 h w"]:
        """The batch's masks."""
        if "mask" in batch:
            return as_input(batch["mask"])
        images = batch["image"]
        draws = SampleRandom(self.seed, batch["serial"].tolist())  # on the CPU, where the numbers are: nothing waits
        return on_device(self.masks(draws, *images.shape[2:]), images.device)


def random_boxes(random: Randomness, height: int, width: int) -> Float[Tensor, "b 1 h w"]:
    """Two rectangles a picture, each side U[0.15, 0.5) of the picture's, at a random place.

    Deviation: LDM trains with the thick strokes and boxes of LaMa.
    """
    rows = torch.arange(height).add(0.5).div(height)
    columns = torch.arange(width).add(0.5).div(width)
    mask = torch.zeros(random.batch, 1, height, width)
    for box in range(2):
        inside = []
        for axis, places in (("y", rows), ("x", columns)):
            side = 0.15 + 0.35 * random.uniform(f"mask/{box}/side_{axis}")
            begin = (1 - side) * random.uniform(f"mask/{box}/{axis}")
            inside.append((places >= begin[:, None]) & (places < (begin + side)[:, None]))
        mask = torch.maximum(mask, as_input(inside[0][:, None, :, None] & inside[1][:, None, None, :]))
    return mask


def resized_mask(mask: Float[Tensor, "b 1 h w"], size: tuple[int, int]) -> Float[Tensor, "b 1 i j"]:
    """The mask at the latent's size, by nearest neighbours as in the official script."""
    return F.interpolate(mask, size=size, mode="nearest")


class SpatialRescaler(nn.Module):
    """``halvings`` times half the side, bilinear without antialiasing, then a 1x1 convolution without bias (LDM)."""

    def __init__(self, in_channels: int, out_channels: int, halvings: int) -> None:
        super().__init__()
        self.halvings = halvings
        self.mix = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.mix(x)


class SemanticMapConditioner(_Map, nn.Module):
    """A semantic map beside the latent: one-hot classes through a trained :class:`SpatialRescaler` (LDM, 4.3.2).

    Reads ``segmentation`` [B, H, W], int64; a pixel of -1 has no class, and zeros for it. It is optimised with the
    network and not averaged.

    Args:
        autoencoder: whose down-sampling, a power of 2, the map follows.
        classes: number of classes of the map (COCO-Stuff: 182).
        channels: of the map beside the latent (LDM: 3).

    Raises:
        UserError: at a call for a batch without semantic maps.
    """

    # Its classes are checked by the data, which know the file: here it would cost a wait for the device.
    reads = ("segmentation",)

    def __init__(self, autoencoder: Autoencoder, classes: int = 182, channels: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.concat_channels = channels
        self.rescale = SpatialRescaler(classes, channels, autoencoder.downsampling.bit_length() - 1)

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """The rescaled map, [B, channels, H / f, W / f]."""
        if "segmentation" not in batch:
            raise UserError("conditioner: the data have no semantic maps ('segmentation' [B, H, W] in a batch)")
        segmentation: Int[Tensor, "b h w"] = batch["segmentation"]
        known = torch.where(segmentation < 0, self.classes, segmentation)
        one_hot = as_input(rearrange(F.one_hot(known, self.classes + 1), "b h w c -> b c h w")[:, :-1])
        return Cond(spatial=self.rescale(one_hot))


def pictures(batch: Mapping[str, Any]) -> Float[Tensor, "b 3 h w"]:
    """The batch's pictures in [0, 1].

    Raises:
        UserError: when there are none.
    """
    if batch.get("image") is None:
        raise UserError("conditioner: reads pictures, but batches have none; set data.keep_images=true")
    return as_input(batch["image"]) / 255
