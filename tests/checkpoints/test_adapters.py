import pytest
import torch

from repalign.aligners.heads import MLPHead
from repalign.backbones.dit import DiT
from repalign.checkpoints.dit import DiTAdapter
from repalign.checkpoints.repa import REPAAdapter
from repalign.errors import UserError


def parts():
    return {
        "backbone": DiT((4, 8, 8), 10, 2, 32, 3, 4, qk_norm=True).state_dict(),
        "aligners.repa.head": MLPHead(32, 24, 40).state_dict(),
    }


@pytest.mark.parametrize("adapter", [DiTAdapter(), REPAAdapter()])
def test_out_and_in_again_is_the_identity(adapter):
    ours = parts()
    back = adapter.from_official(adapter.to_official(ours))
    for name, state in back.items():
        assert state.keys() == ours[name].keys()
        assert all(torch.equal(state[k], ours[name][k]) for k in state)


def test_official_names():
    official = REPAAdapter().to_official(parts())
    for key in (
        "pos_embed",
        "x_embedder.proj.weight",
        "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "blocks.2.adaLN_modulation.1.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.0.attn.q_norm.weight",
        "blocks.1.mlp.fc1.weight",
        "final_layer.adaLN_modulation.1.bias",
        "final_layer.linear.weight",
        "projectors.0.4.bias",
    ):
        assert key in official


def test_legacy_blocks_after_the_tap():
    official = REPAAdapter().to_official(parts())
    legacy = {k.replace("blocks.2.", "decoder_blocks.0."): v for k, v in official.items()}
    back = REPAAdapter(encoder_depth=2).from_official(legacy)
    assert back["backbone"].keys() == parts()["backbone"].keys()
    with pytest.raises(UserError, match="encoder_depth"):
        REPAAdapter().from_official(legacy)


@pytest.mark.parametrize("key", ["joint_blocks.0.x_block.attn.qkv.weight", "projectors.1.0.weight"])
def test_foreign_keys_are_named(key):
    with pytest.raises(UserError, match=key.split(".")[0].rstrip("s")):
        REPAAdapter().from_official({key: torch.zeros(1)})
