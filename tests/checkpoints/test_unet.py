"""LDM's and diffusers' U-Net files: round trips, whole checkpoints, and diffusers' own network on our export."""

import pytest
import torch

from repalign.backbones.clocks import StepClock
from repalign.checkpoints.unet import DiffusersUNetAdapter, LDMUNetAdapter
from repalign.errors import UserError
from repalign.state import Cond
from tests.backbones.test_unet import KINDS, inputs, tiny


@pytest.mark.parametrize("adapter", [LDMUNetAdapter, DiffusersUNetAdapter])
@pytest.mark.parametrize("name", KINDS)
def test_out_and_in_again_is_the_same(name, adapter):
    net = tiny(**KINDS[name])
    state = net.state_dict()
    file = adapter(net).to_official({"backbone": state})
    back = adapter(net).from_official(file)["backbone"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_whole_checkpoint_of_ldm_gives_the_live_weights_or_the_average():
    net = tiny(heads=2)
    file = LDMUNetAdapter(net, prefix="model.diffusion_model.").to_official({"backbone": net.state_dict()})
    whole = {
        **file,
        **{f"model_ema.{key.removeprefix('model.').replace('.', '')}": v + 1 for key, v in file.items()},
        "model_ema.decay": torch.tensor(0.9999),
        "betas": torch.zeros(1000),
        "first_stage_model.quant_conv.weight": torch.zeros(1),
    }
    for average in (False, True):
        back = LDMUNetAdapter(net, average).from_official(whole)["backbone"]
        for key, value in net.state_dict().items():
            torch.testing.assert_close(back[key].sort().values, (value + average).sort().values)


def test_another_architecture_is_refused():
    net = tiny(heads=2)
    with pytest.raises(UserError, match=r"'blocks.0.attn.qkv.weight' is none of this U-Net's"):
        LDMUNetAdapter(net).from_official({"blocks.0.attn.qkv.weight": torch.zeros(1)})


@pytest.mark.slow
@pytest.mark.parametrize("options", [KINDS["plain"], {"heads": 2, "label": True}, KINDS["text"]])
def test_diffusers_reads_our_export_and_says_the_same(options):
    """Where the architectures coincide: diffusers' network with scale and shift has no norm in its middle attention."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    net = tiny(**options)
    common = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16)}
    common |= {"layers_per_block": 2, "norm_num_groups": 4, "norm_eps": 1e-5}
    x, t, cond = inputs()
    steps = t.long()
    if "context_dim" in options:
        kinds = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        theirs = UNet2DConditionModel(
            **common, **kinds, cross_attention_dim=5, attention_head_dim=2, transformer_layers_per_block=2
        )
        call = lambda: theirs(x, steps, encoder_hidden_states=cond.text.data).sample
    else:
        theirs = UNet2DModel(
            **common,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            flip_sin_to_cos=True,
            freq_shift=0,
            downsample_padding=1,
            num_class_embeds=11 if options.get("label") else None,
        )
        call = lambda: theirs(x, steps, class_labels=cond.label if options.get("label") else None).sample
    theirs.load_state_dict(DiffusersUNetAdapter(net).to_official({"backbone": net.state_dict()}))
    with torch.no_grad():
        ours = StepClock(net, 1000)(x, (t + 1) / 1000, Cond(label=cond.label, text=cond.text)).pred
        torch.testing.assert_close(call(), ours, rtol=1e-4, atol=1e-4)
