"""Official DiT and SiT checkpoints to the house's ``DiT`` and back.

Both codes name the same network the same way. Convention of the weights: DiT is fed integer steps (``StepClock``), SiT
runs from noise to data (``ReversedClock``); both have a variance half in the final linear layer.
"""

from __future__ import annotations

from torch import Tensor

from repalign.checkpoints.keys import KeyMap, StateDict


def keys_of(patches: str) -> KeyMap:
    """Keys of the network when its patches' layers are at ``patches`` (a token io, or a part of one)."""
    return KeyMap([*TRUNK, ("x_embedder.proj.", f"{patches}.patchify."), ("final_layer.linear.", f"{patches}.linear.")])


TRUNK = (
    ("pos_embed", "pos_embed"),
    ("t_embedder.", "time_embed."),
    ("y_embedder.embedding_table.", "label_embed."),
    ("blocks.#.adaLN_modulation.1.", "blocks.#.modulation.linear."),
    ("blocks.#.attn.", "blocks.#.attention."),
    ("blocks.#.mlp.", "blocks.#.mlp."),
    ("final_layer.adaLN_modulation.1.", "final_modulation.linear."),
)
KEYS = keys_of("io")


class DiTAdapter:
    """Keys of facebookresearch/DiT and willisma/SiT; one part, the backbone."""

    containers = ("model", "ema")

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.dit.DiT``}."""
        return {"backbone": KEYS.to_house(official)}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict of the backbone; other parts are not DiT's and stay behind."""
        return KEYS.to_official(parts["backbone"])
