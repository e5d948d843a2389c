"""Round trips: a tiny network, written as its family's official file, gives the same tokens when it is read."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from repalign.encoders import weights as weights_module
from repalign.errors import UserError
from tests.encoders.small import small, stirred


def renamed(state, *pairs):
    for old, new in pairs:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def official_mae(state):
    extra = {
        "norm.weight": torch.ones(16),
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 16),
    }
    return {"model": {**state, **extra}}


def official_mocov3(state):
    spoilt = renamed(
        state,
        (r"blocks\.13\.norm1\.", "blocks.13.norm13."),
        (r"blocks\.13\.mlp\.fc1\.", "blocks.13.mlp.fc13."),
        (r"blocks\.14\.norm2\.", "blocks.14.norm14."),
        (r"blocks\.14\.mlp\.fc2\.", "blocks.14.mlp.fc14."),
    )
    assert spoilt.keys() != state.keys()
    return {
        "epoch": 300,
        "state_dict": {
            **{f"module.base_encoder.{key}": value for key, value in spoilt.items()},
            **{f"module.momentum_encoder.{key}": torch.zeros_like(value) for key, value in state.items()},
            "module.base_encoder.head.0.weight": torch.ones(4, 16),
            "module.predictor.0.weight": torch.ones(4, 4),
        },
    }


def official_jepa(state):
    return {"encoder": {f"module.{key}": value for key, value in state.items()}, "epoch": 300}


def official_dinov2(state):
    return {**state, "mask_token": torch.ones(1, 16)}


def official_dinov2_registers(state):
    """The class token's position is a row of the table; timm adds it to the token."""
    held = {k: v for k, v in state.items() if k not in ("cls_token", "pos_embed", "reg_token")}
    own = torch.full((1, 1, 16), 0.25)
    return {
        **held,
        "cls_token": state["cls_token"] - own,
        "pos_embed": torch.cat([own, state["pos_embed"]], 1),
        "register_tokens": state["reg_token"],
        "mask_token": torch.ones(1, 16),
    }


def official_dinov2_giant(state):
    return official_dinov2(renamed(state, (r"mlp\.fc1\.", "mlp.w12."), (r"mlp\.fc2\.", "mlp.w3.")))


def official_dinov3(state):
    held = renamed(
        state, (r"\.gamma_1$", ".ls1.gamma"), (r"\.gamma_2$", ".ls2.gamma"), ("^reg_token$", "storage_tokens")
    )
    bias = torch.zeros(48)
    bias[16:32] = 7.0
    extra = {f"blocks.{i}.attn.qkv.{name}": bias for i in range(2) for name in ("bias", "bias_mask")}
    return {**held, **extra, "mask_token": torch.ones(1, 16), "rope_embed.periods": torch.ones(4)}


def official_clip(state):
    visual = renamed(
        state,
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^blocks\.(\d+)\.norm(\d)", r"transformer.resblocks.\1.ln_\2"),
        (r"^blocks", "transformer.resblocks"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    visual["class_embedding"] = visual.pop("cls_token")[0, 0]
    visual["positional_embedding"] = visual.pop("pos_embed")[0]
    visual |= {"ln_post.weight": torch.ones(16), "ln_post.bias": torch.ones(16), "proj": torch.ones(16, 8)}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "positional_embedding": torch.ones(77, 4)}
    return {**{f"visual.{key}": value for key, value in visual.items()}, **text}


def with_head(state):
    return {**state, "head.weight": torch.ones(10, 16), "attn_pool.latent": torch.ones(1, 1, 16)}


OFFICIAL = [
    ("dinov1_b", dict, {}),
    ("dinov2_b", official_dinov2, {}),
    ("dinov2_b_reg", official_dinov2_registers, {}),
    ("dinov2_g", official_dinov2_giant, {"mlp_ratio": 4}),
    ("dinov3_s", official_dinov3, {}),
    ("mae_l", official_mae, {}),
    ("mocov3_l", official_mocov3, {"depth": 15}),
    ("jepa_h", official_jepa, {}),
    ("clip_l", official_clip, {}),
    ("siglip_b", with_head, {}),
]


@pytest.mark.parametrize(
    ("card", "official", "architecture"), OFFICIAL, ids=lambda value: str(getattr(value, "__name__", value))
)
def test_official_files_round_trip(card, official, architecture, tmp_path):
    donor = stirred(card, architecture=architecture)
    file = tmp_path / "weights.pth"
    torch.save(official(donor.network.state_dict()), file)
    encoder = small(card, weights=str(file), architecture=architecture)
    images = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(small(card, architecture=architecture)(images).data, donor(images).data, atol=1e-2)
    torch.testing.assert_close(encoder(images).data, donor(images).data)


@pytest.mark.parametrize(("card", "architecture"), [(card, architecture) for card, _, architecture in OFFICIAL])
def test_own_names_in_safetensors_round_trip(card, architecture, tmp_path):
    donor = stirred(card, architecture=architecture)
    file = tmp_path / "weights.safetensors"
    save_file(donor.network.state_dict(), file)
    encoder = small(card, weights=str(file), architecture=architecture)
    assert encoder.fingerprint == donor.fingerprint


def test_position_tables_of_another_grid_are_resampled_and_keep_the_class_token(tmp_path):
    donor = stirred("dinov2_b", 64)
    file = tmp_path / "weights.safetensors"
    save_file(donor.network.state_dict(), file)
    positions = small("dinov2_b", 32, weights=str(file)).network.pos_embed
    own = donor.network.pos_embed
    assert positions.shape == (1, 5, 16)
    torch.testing.assert_close(positions[:, 0], own[:, 0])
    table = own[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    shrunk = F.interpolate(table, size=(2, 2), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(positions[:, 1:], shrunk.flatten(2).transpose(1, 2))


def test_the_hub_is_asked_for_the_cards_copy(monkeypatch):
    donor, asked = stirred("dinov2_b"), []

    def download(place):
        asked.append(place)
        return donor.network.state_dict()

    monkeypatch.setattr(weights_module, "load_state_dict_from_hf", download)
    assert small("dinov2_b", weights="hub").fingerprint == donor.fingerprint
    assert asked == ["timm/vit_base_patch14_dinov2.lvd142m"]


def test_a_card_that_is_on_no_hub_can_come_from_its_url(monkeypatch):
    donor, asked = stirred("jepa_h"), []

    def download(place, *, map_location, weights_only):
        assert weights_only
        asked.append(place)
        return official_jepa(donor.network.state_dict())

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert small("jepa_h", weights="hub").fingerprint == donor.fingerprint
    assert asked == ["https://dl.fbaipublicfiles.com/ijepa/IN1K-vit.h.14-300e.pth.tar"]


def test_an_absent_network_is_one_line(monkeypatch):
    def download(place):
        raise OSError("no route\nto host")

    monkeypatch.setattr(weights_module, "load_state_dict_from_hf", download)
    with pytest.raises(
        UserError, match=r"^encoders\.main\.weights: 'hub' found no dinov2_b at timm/\S+ \(no route\); .*$"
    ):
        small("dinov2_b", weights="hub")
    with pytest.raises(UserError, match=r"encoders\.main\.weights: mocov3_l is on no hub; give the path .*rcg"):
        small("mocov3_l", weights="hub")


def test_a_missing_file_is_named_with_its_nearest(tmp_path):
    (tmp_path / "dinov2_vitb14.pth").touch()
    with pytest.raises(
        UserError, match=r"encoders\.main\.weights: no file .*dinov2_vitb.pth.*Did you mean 'dinov2_vitb14.pth'"
    ):
        small("dinov2_b", weights=str(tmp_path / "dinov2_vitb.pth"))
    with pytest.raises(UserError, match=r"no file 'randon' .*Did you mean 'random'\?"):
        small("dinov2_b", weights="randon")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_broken_file_is_one_line(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match="encoders.main.weights: .* holds more than tensors, or is broken"):
        small("dinov2_b", weights=str(file))


class Program:
    """Stands for a pickle that would run code."""


def test_a_file_that_would_run_code_is_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save({"model": Program()}, file)
    with pytest.raises(UserError, match="encoders.main.weights: .* holds more than tensors"):
        small("mae_b", weights=str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm2.bias"},
            "'blocks.1.norm2.bias' is absent in the file",
        ),
        (lambda s: {**s, "blocks.2.norm1.bias": torch.ones(16)}, "'blocks.2.norm1.bias' is 16 in the file, absent in"),
        (lambda s: {**s, "norm.bias": torch.ones(8)}, "'norm.bias' is 8 in the file, 16 in the encoder"),
        (
            lambda s: {**s, "patch_embed.proj.weight": torch.ones(16, 3, 16, 16)},
            "is 16x3x16x16 in the file, 16x3x14x14",
        ),
        (lambda s: {"epoch": 3, **s}, "it holds 'epoch' of type int"),
    ],
)
def test_weights_of_another_network_are_refused(change, message, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(change(stirred("dinov2_b").network.state_dict()), file)
    with pytest.raises(UserError, match=message):
        small("dinov2_b", weights=str(file))
