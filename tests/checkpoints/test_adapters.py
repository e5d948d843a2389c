import pytest
import torch

from repalign.aligners.heads import MLPHead
from repalign.backbones.dit import DiT
from repalign.checkpoints.dit import DiTAdapter
from repalign.checkpoints.redi import ReDiAdapter
from repalign.checkpoints.reg import reg_adapter
from repalign.checkpoints.repa import REPAAdapter
from repalign.errors import UserError
from repalign.nn.stream_io import ChannelIO, PatchAndClassIO


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


CLASS, MAPS = {"latent": (4, 8, 8), "class_token": (24,)}, {"latent": (4, 8, 8), "features": (8, 8, 8)}


@pytest.mark.parametrize(
    ("adapter", "token_io", "shape", "official"),
    [
        (
            reg_adapter(),
            PatchAndClassIO,
            CLASS,
            {
                "cls_projectors2.weight": (32, 24),
                "wg_norm.bias": (32,),
                "final_layer.linear_cls.weight": (24, 32),
                "final_layer.linear.weight": (16, 32),
                "x_embedder.proj.weight": (32, 4, 2, 2),
                "pos_embed": (1, 17, 32),
                "projectors.0.4.bias": (24,),
            },
        ),
        (
            ReDiAdapter(),
            ChannelIO,
            MAPS,
            {
                "x_embedder.proj.weight": (32, 12, 2, 2),
                "final_layer.linear.weight": (48, 32),
                "pos_embed": (1, 16, 32),
                "projector.4.bias": (24,),
            },
        ),
    ],
)
def test_several_streams_go_out_and_in_again(adapter, token_io, shape, official):
    ours = {**parts(), "backbone": DiT(shape, 10, 2, 32, 3, 4, token_io=token_io).state_dict()}
    out = adapter.to_official(ours)
    assert official.items() <= {key: tuple(value.shape) for key, value in out.items()}.items()
    assert not any(key.startswith("io.") for key in out)
    back = adapter.from_official(out)
    assert back.keys() == ours.keys()
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
