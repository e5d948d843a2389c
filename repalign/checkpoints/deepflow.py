"""Official DeepFlow checkpoints to the house's ``DeepFlow`` and aligner heads, and back."""

from __future__ import annotations

from collections.abc import Sequence

from repalign.checkpoints.dit import KEYS as DIT_KEYS
from repalign.checkpoints.keys import KeyMap
from repalign.checkpoints.repa import REPAAdapter

KEYS = KeyMap(
    [
        ("dt_embedder.", "gap_embed."),
        ("df_blocks.#.acc_mlp.", "vera.#.acceleration_mlp."),
        ("df_blocks.#.acc_norm.adaLN_modulation.1.", "vera.#.modulation.linear."),
        ("df_blocks.#.acc_norm.mlp.", "vera.#.mlp."),
        ("df_blocks.#.cross_attention.multihead_attn.", "vera.#.attention."),
        ("df_blocks.#.cross_attention.layer_norm.", "vera.#.norm."),
        ("final_layer.0.linear.", "velocity_head.linear."),
        ("final_layer.0.adaLN_modulation.1.", "velocity_head.modulation.linear."),
        ("final_layer.1.linear.", "io.linear."),
        ("final_layer.1.adaLN_modulation.1.", "final_modulation.linear."),
        ("final_acc_layer.linear.", "acceleration_head.linear."),
        ("final_acc_layer.adaLN_modulation.1.", "acceleration_head.modulation.linear."),
        *(pair for pair in DIT_KEYS.pairs if not pair[0].startswith("final_layer.")),
    ]
)


def deepflow_adapter(aligners: Sequence[str] = ("repa",)) -> REPAAdapter:
    """Keys of ByteDance-Seed/DeepFlow: SiT's trunk, VeRA blocks, two velocity heads and an acceleration head.

    Projector k is the head of the k-th named aligner, as in REPA; here it belongs to the tap ``vera.{k + 1}``.
    """
    return REPAAdapter(aligners, keys=KEYS)
