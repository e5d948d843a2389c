"""Frozen vision transformers: one class, a card per encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor

from repalign.encoders.cards import Card, read_card
from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.preprocess import input_for
from repalign.encoders.weights import fill, find_weights
from repalign.errors import UserError, unknown_choice
from repalign.state import Tokens, TokenSpec

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ViTEncoder(Frozen):
    """Patch tokens of a frozen vision transformer: DINO v1 to v3, MAE, MoCo v3, I-JEPA, CLIP, SigLIP.

    Images [B, 3, H, W] in [0, 1] are normalised and resampled as the card says. The output is [B, N, D] in float32 of
    the last block, with the final norm where REPA takes it (DINO, MoCo v3, I-JEPA) and without where it does not (MAE,
    CLIP); N = (input size / patch)^2 in row-major order. Class and register tokens are dropped; the class token can be
    kept in front (``class_token``), with the same norm.

    Source: REPA (Yu et al., arXiv:2410.06940), official ``load_encoders`` and ``preprocess_raw_image``. Deviations: MAE
    and I-JEPA are in evaluation mode there by intention only; the precision is an option here, never the surrounding
    autocast; at sides that are no multiple of 256 the input side is patch * side / 16, where the official code rounds
    down to a multiple of 224.

    Args:
        card: name of a card in ``cards.yaml``, or a card.
        image_size: side of the images in pixels, a multiple of 16; sets the default ``input_size``.
        weights: ``hub``, the path of a weight file, or ``random`` (said in the log; the same numbers each time).
        input_size: side of what the network sees, a multiple of its patch; None for patch * image_size / 16.
        class_token: keep the class token as prefix 1.
        precision: float32 or bfloat16, of weights and arithmetic.
        architecture: arguments of timm's network over the card's (sizes of a small twin, for instance).

    Raises:
        UserError: for an unknown card or precision, a side that does not fit, weights that are missing or do not fit,
            or a class token that the network has not.
    """

    def __init__(
        self,
        card: str | Card,
        image_size: int,
        weights: str = "hub",
        *,
        input_size: int | None = None,
        class_token: bool = False,
        precision: str = "float32",
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown_choice("encoders.main.precision", precision, PRECISIONS, "precision")
        self.card = read_card(card) if isinstance(card, str) else card
        options = {"patch_size": self.card.patch, **self.card.architecture, **(architecture or {})}
        self.preprocess = input_for(self.card, image_size, input_size, options["patch_size"])
        found = find_weights(self.card, weights)  # before the network is built, so that an absence is said at once
        self.network = _build(self.card, self.preprocess.size, options)
        if class_token and not self.network.num_prefix_tokens:
            raise UserError(f"encoders.main.class_token: {self.card.name} has no class token; set it to false")
        self.facts = (self.card.timm, sorted(options.items(), key=lambda pair: pair[0]), self.card.final_norm)
        if found is not None:
            fill(self.network, self.card, *found)
        self.network.to(PRECISIONS[precision])
        self.class_token = class_token
        side = self.preprocess.size // options["patch_size"]
        self.spec = TokenSpec(self.network.embed_dim, (side, side), int(class_token))
        self.freeze()

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Tokens:
        """Images in [0, 1] -> tokens as :attr:`spec` says, without gradient."""
        return self.tokens_of(self.preprocess(images.float()))

    @torch.no_grad()
    def tokens_of(self, prepared: Float[Tensor, "b 3 s s"]) -> Tokens:
        """Tokens of an input that is normalised and resampled already."""
        dtype = next(self.network.parameters()).dtype
        with torch.autocast(prepared.device.type, enabled=False):
            [last] = self.network.forward_intermediates(
                prepared.to(dtype),
                indices=1,
                norm=self.card.final_norm,
                return_prefix_tokens=self.class_token,
                output_fmt="NLC",
                intermediates_only=True,
            )
        if self.class_token:
            patches, prefix = last
            last = torch.cat([prefix[:, :1], patches], dim=1)
        return Tokens(last.float(), self.spec.grid, self.spec.prefix)

    @cached_property
    def fingerprint(self) -> str:
        """Stands for card, weights and input: the name under which features may be cached."""
        given = digest(self.network, self.facts, self.preprocess.facts, self.spec)
        return f"{self.card.name}-{self.preprocess.size}-{given}"


def _build(card: Card, size: int, options: Mapping[str, Any]) -> Any:
    """The timm network; its initial weights depend on nothing but its architecture."""
    # A norm that is not applied is not built, so that no file needs to hold it.
    norm = {} if card.final_norm else {"final_norm": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(card.timm, pretrained=False, img_size=size, num_classes=0, **norm, **options)
