"""Official DDT checkpoints (MCG-NJU/DDT) to the house's ``DDT`` or ``ImprovedDiT`` with its projector, and back.

Lightning files: the live network below ``denoiser.``, the average below ``ema_denoiser.``, the projector below
``diffusion_trainer.proj.0.``; a compiled network's keys hold ``_orig_mod.``. Convention of the weights: time runs from
noise to data (``ReversedClock``), patches are flattened channel first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from einops import rearrange
from torch import Tensor

from repalign.checkpoints.keys import KeyMap, StateDict
from repalign.errors import UserError

LIVE, AVERAGE, PROJECTOR = "denoiser.", "ema_denoiser.", "diffusion_trainer.proj.0."
ENDS = [
    ("x_embedder.proj.", "io.patchify."),
    ("s_embedder.proj.", "encoder_embed."),
    ("t_embedder.", "time_embed."),
    ("y_embedder.embedding_table.", "label_embed."),
    ("final_layer.linear.", "io.linear."),
    ("final_layer.adaLN_modulation.0.", "final_norm.modulation.linear."),
]
INSIDE_BLOCK = [
    ("adaLN_modulation.0.", "modulation.linear."),
    ("attn.", "attention."),
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
    ("mlp.", "mlp."),
]
EMBEDS = ("io.patchify.weight", "encoder_embed.weight")
OUTPUT = ("io.linear.weight", "io.linear.bias")


class DDTAdapter:
    """Keys of MCG-NJU/DDT; parts are ``backbone`` and the first aligner's head.

    Args:
        channels: C of the latent; the patch follows from it.
        blocks: depth of the encoder and of the decoder, whose blocks are one list there; the file does not tell where
            the encoder ends. None for the undivided improved DiT.
        aligners: the projector is the head of the first of them; others are not DDT's.
        average: read the averaged weights rather than the live ones.

    Raises:
        UserError: for keys of another family, or a file without the weights that are wanted.
    """

    containers = ("state_dict",)

    def __init__(
        self,
        channels: int,
        blocks: tuple[int, int] | None,
        aligners: Sequence[str] = ("repa",),
        average: bool = True,
    ) -> None:
        self.channels = channels
        self.head = f"aligners.{aligners[0]}.head" if aligners else None
        self.own = AVERAGE if average else LIVE
        self.keys = KeyMap([*ENDS, *_block_pairs(blocks)])

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name, from a Lightning state dict or from a bare network's."""
        plain = {key.replace("_orig_mod.", ""): value for key, value in official.items()}
        network, head = _below(self.own, plain), _below(PROJECTOR, plain)
        if not network:
            if any(key.startswith((LIVE, AVERAGE)) for key in plain):
                raise UserError(
                    f"checkpoint: no key begins with '{self.own}'; set task.weights to the other of ema, model"
                )
            network = plain
        parts = {"backbone": self._square(self.keys.to_house(network))}
        if head and self.head is not None:
            parts[self.head] = {f"layers.{key}": value for key, value in head.items()}
        return parts

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official Lightning state dict; the same weights below both prefixes."""
        network = self.keys.to_official(self._flat(parts["backbone"]))
        head = parts.get(self.head, {}) if self.head is not None else {}
        return {
            **{prefix + key: value for prefix in (LIVE, AVERAGE) for key, value in network.items()},
            **{PROJECTOR + key.removeprefix("layers."): value for key, value in head.items()},
        }

    def _square(self, house: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embedders [D, C p p] to convolutions; output rows (channel, row, column) to (row, column, channel)."""
        c = self.channels
        for key, value in house.items():
            if key in EMBEDS:
                p = _side(value.shape[1], c)
                house[key] = rearrange(value, "d (c p q) -> d c p q", c=c, p=p)
            elif key in OUTPUT:
                house[key] = rearrange(value, "(c p q) ... -> (p q c) ...", c=c, p=_side(len(value), c))
        return house

    def _flat(self, house: StateDict) -> dict[str, Tensor]:
        """The reverse of :meth:`_square`."""
        c, flat = self.channels, dict(house)
        for key, value in house.items():
            if key in EMBEDS:
                flat[key] = rearrange(value, "d c p q -> d (c p q)")
            elif key in OUTPUT:
                flat[key] = rearrange(value, "(p q c) ... -> (c p q) ...", c=c, p=_side(len(value), c))
        return flat


def _block_pairs(blocks: tuple[int, int] | None) -> list[tuple[str, str]]:
    if blocks is None:
        return [(f"blocks.#.{theirs}", f"blocks.#.{ours}") for theirs, ours in INSIDE_BLOCK]
    encoder, decoder = blocks
    names = [f"encoder.{i}" for i in range(encoder)] + [f"decoder.{i}" for i in range(decoder)]
    return [(f"blocks.{i}.{theirs}", f"{name}.{ours}") for i, name in enumerate(names) for theirs, ours in INSIDE_BLOCK]


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _side(flat: int, channels: int) -> int:
    """The patch size of a flattened patch."""
    side = math.isqrt(flat // channels)
    if side * side * channels != flat:
        raise UserError(f"checkpoint: {flat} values per patch are no square patch of {channels} channels")
    return side
