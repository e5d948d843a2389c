import pytest
import torch
from einops import rearrange

from repalign.aligners.heads import MLPHead
from repalign.backbones.ddt import DDT
from repalign.backbones.improved_dit import ImprovedDiT
from repalign.checkpoints.ddt import DDTAdapter
from repalign.errors import UserError
from repalign.state import Cond

SIZES = {"patch": 2, "dim": 32, "heads": 2}


def network(blocks=(2, 1)):
    torch.manual_seed(0)
    if blocks is None:
        net = ImprovedDiT((4, 8, 8), 10, depth=3, **SIZES)
    else:
        net = DDT((4, 8, 8), 10, depth=sum(blocks), encoder_depth=blocks[0], **SIZES)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def parts(blocks=(2, 1)):
    return {"backbone": network(blocks).state_dict(), "aligners.repa.head": MLPHead(32, 24, 32).state_dict()}


@pytest.mark.parametrize("blocks", [(2, 1), (1, 11), None])
@pytest.mark.parametrize("average", [True, False])
def test_out_and_in_again_is_the_identity(blocks, average):
    ours = parts(blocks)
    adapter = DDTAdapter(4, blocks, average=average)
    official = adapter.to_official(ours)
    back = adapter.from_official(official)
    assert back.keys() == ours.keys()
    for name, state in back.items():
        assert state.keys() == ours[name].keys()
        assert all(torch.equal(state[k], ours[name][k]) for k in state)


def test_official_names_and_shapes():
    official = DDTAdapter(4, (2, 1)).to_official(parts())
    shapes = {
        "denoiser.x_embedder.proj.weight": (32, 16),
        "denoiser.s_embedder.proj.bias": (32,),
        "ema_denoiser.t_embedder.mlp.0.weight": (32, 256),
        "denoiser.y_embedder.embedding_table.weight": (11, 32),
        "denoiser.blocks.2.attn.qkv.weight": (96, 32),
        "ema_denoiser.blocks.0.attn.q_norm.weight": (16,),
        "denoiser.blocks.1.adaLN_modulation.0.bias": (192,),
        "denoiser.blocks.0.mlp.w3.weight": (85, 32),
        "denoiser.blocks.2.norm2.weight": (32,),
        "denoiser.final_layer.adaLN_modulation.0.weight": (64, 32),
        "denoiser.final_layer.linear.bias": (16,),
        "diffusion_trainer.proj.0.4.weight": (24, 32),
    }
    assert {key: tuple(official[key].shape) for key in shapes} == shapes


def test_the_official_output_rows_are_channel_first():
    """A constant output per channel shows which rows are which."""
    official = DDTAdapter(4, (2, 1)).to_official({"backbone": network().state_dict()})
    official = {k: v for k, v in official.items() if k.startswith("denoiser.")}
    bias = rearrange(torch.arange(4.0).repeat(4, 1), "pq c -> (c pq)")
    official["denoiser.final_layer.linear.bias"] = bias
    official["denoiser.final_layer.linear.weight"] = torch.zeros(16, 32)
    net = network()
    net.load_state_dict(DDTAdapter(4, (2, 1), average=False).from_official(official)["backbone"])
    pred = net(torch.randn(1, 4, 8, 8), torch.rand(1), Cond(label=torch.zeros(1, dtype=torch.int64))).pred
    assert pred[0, :, 3, 5].tolist() == [0, 1, 2, 3]


def test_average_and_live_weights_are_told_apart_and_compiled_keys_are_read():
    official = DDTAdapter(4, (2, 1)).to_official(parts())
    official = {
        key.replace("denoiser.", "denoiser._orig_mod."): value + 1 if key.startswith("ema_") else value
        for key, value in official.items()
    }
    live = DDTAdapter(4, (2, 1), average=False).from_official(official)["backbone"]
    average = DDTAdapter(4, (2, 1)).from_official(official)["backbone"]
    assert all(torch.equal(live[key] + 1, average[key]) for key in live)


def test_missing_averages_and_foreign_keys_are_named():
    official = DDTAdapter(4, (2, 1)).to_official(parts())
    live = {key: value for key, value in official.items() if not key.startswith("ema_")}
    with pytest.raises(UserError, match=r"ema_denoiser.*task\.weights"):
        DDTAdapter(4, (2, 1)).from_official(live)
    bare = {key.removeprefix("denoiser."): value for key, value in live.items() if key.startswith("denoiser.")}
    assert DDTAdapter(4, (2, 1)).from_official(bare)["backbone"].keys() == network().state_dict().keys()
    with pytest.raises(UserError, match="joint_blocks"):
        DDTAdapter(4, (2, 1)).from_official({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"blocks\.2\."):
        DDTAdapter(4, (1, 1)).from_official(official)
    with pytest.raises(UserError, match="no square patch of 3 channels"):
        DDTAdapter(3, (2, 1)).from_official(official)
