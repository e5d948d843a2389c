"""SRA and U-REPA: out and in again, with and without heads. LayerSync has DiT's keys."""

import pytest
import torch

from repalign.aligners.heads import MLPHead, TwoLayerHead
from repalign.backbones.dit import DiT
from repalign.backbones.sit_down import SiTDown
from repalign.checkpoints.sra import SRAAdapter
from repalign.checkpoints.u_repa import URepaAdapter
from repalign.errors import UserError


def sra_parts():
    return {
        "backbone": DiT((4, 8, 8), 10, 2, 16, 2, 2, variance_head=True).state_dict(),
        "aligners.sra.head": TwoLayerHead(16, 16).state_dict(),
    }


def u_repa_parts():
    return {
        "backbone": SiTDown((4, 8, 8), 10, 2, 16, (1, 2, 1), 2, mid_mult=2, qk_norm=True).state_dict(),
        "aligners.u_repa.head": MLPHead(32, 12, 24).state_dict(),
    }


CASES = [(SRAAdapter, sra_parts), (URepaAdapter, u_repa_parts)]


@pytest.mark.parametrize(("adapter", "parts"), CASES)
def test_out_and_in_again_is_the_identity(adapter, parts):
    ours = parts()
    back = adapter().from_official(adapter().to_official(ours))
    assert back.keys() == ours.keys()
    for name, state in back.items():
        assert state.keys() == ours[name].keys()
        assert all(torch.equal(state[k], ours[name][k]) for k in state)


@pytest.mark.parametrize(("adapter", "parts"), CASES)
def test_heads_may_stay_behind(adapter, parts):
    official = adapter().to_official(parts())
    assert adapter([]).from_official(official).keys() == {"backbone"}
    bare = adapter().to_official({"backbone": parts()["backbone"]})
    assert adapter().from_official(bare).keys() == {"backbone"}


def test_official_names():
    official = SRAAdapter().to_official(sra_parts())
    assert {
        "ap_head.linear1.weight",
        "ap_head.linear2.bias",
        "blocks.1.attn.qkv.weight",
        "pos_embed",
    } <= official.keys()
    official = URepaAdapter().to_official(u_repa_parts())
    for key in (
        "x_embedder.proj.weight",
        "pos_embed",
        "pos_embed_mid",
        "t_embedder.mlp.0.weight",
        "t_embedder_mid.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "y_embedder_mid.embedding_table.weight",
        "encoder.0.attn.q_norm.weight",
        "down.proj.weight",
        "middle.1.adaLN_modulation.1.weight",
        "up.proj.bias",
        "fuse.weight",
        "decoder.0.mlp.fc2.bias",
        "final_layer.adaLN_modulation.1.bias",
        "final_layer.linear.weight",
        "projectors.0.4.bias",
    ):
        assert key in official


@pytest.mark.parametrize("adapter", [SRAAdapter, URepaAdapter])
def test_foreign_keys_are_named(adapter):
    with pytest.raises(UserError, match="joint_blocks"):
        adapter().from_official({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)})
