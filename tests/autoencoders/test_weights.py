"""Files of weights: round trip, foreign layouts, error lines."""

import pytest
import torch
from safetensors.torch import save_file

from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift, Statistics
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.autoencoders.weights import read_weights
from repalign.errors import UserError

PROVENANCE = {"latent_mean": [0.5] * 8, "latent_std": [2.0] * 8, "steps": 7}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return SmallKLAutoencoder(weights="random", width=16)


def sd(weights="random", **changed):
    sizes = {"widths": (8, 16), "depth": 1, "groups": 4}
    return SDAutoencoder(weights=weights, norm=ScaleShift(0.18215), **{**sizes, **changed})


def test_round_trip_keeps_weights_and_metadata(tmp_path, small):
    path = tmp_path / "weights" / "small.safetensors"
    small.save(path, PROVENANCE, torch.float32)
    loaded = SmallKLAutoencoder(weights=path, width=16)
    assert loaded.fingerprint == small.fingerprint
    assert loaded.provenance["steps"] == 7
    sizes = {"class": "SmallKLAutoencoder", "channels": 8, "downsampling": 8, "width": 16}
    assert loaded.provenance["autoencoder"] == sizes
    assert isinstance(loaded.norm, Statistics)
    torch.testing.assert_close(loaded.norm.normalize(torch.full((1, 8, 1, 1), 2.5)), torch.ones(1, 8, 1, 1))
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]  # no partial file is left


def test_half_precision_on_disk_is_single_precision_in_memory(tmp_path, small):
    path = tmp_path / "small.safetensors"
    small.save(path, PROVENANCE)
    assert {t.dtype for t in read_weights(path)[0].values()} == {torch.float16}
    loaded = SmallKLAutoencoder(weights=str(path), width=16)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(loaded.encode(images).mean, small.encode(images).mean, atol=5e-3, rtol=0)


def test_a_norm_in_the_configuration_wins(tmp_path, small):
    path = tmp_path / "small.safetensors"
    small.save(path, PROVENANCE)
    assert SmallKLAutoencoder(weights=path, width=16, norm=ScaleShift(3.0)).norm.scale.item() == 3.0


def ldm_layout(tensors, levels):
    """The inverse of the import, written independently: names and shapes of an LDM checkpoint."""
    held = {}
    for key, value in tensors.items():
        for ours, theirs in [
            ("down_blocks.", "down."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
            ("resnets.", "block."),
            ("attentions.", "attn."),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
        ]:
            key = key.replace(ours, theirs)
        for level in range(levels):
            key = key.replace(f"up_blocks.{level}.", f"up.{levels - 1 - level}.")
        for projection in "qkv":
            key = key.replace(f"to_{projection}", projection)
        is_projection = ".attn" in key and key.endswith("weight") and value.ndim == 2
        held[key] = value[:, :, None, None] if is_projection else value
    return held


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_ldm_checkpoints_load(tmp_path, prefix):
    torch.manual_seed(0)
    source = sd(widths=(8, 16, 24), attention_levels=[1])
    held = {prefix + k: v.clone() for k, v in ldm_layout(source.state_dict(), 3).items()}
    held |= {f"{prefix}loss.logvar": torch.zeros(1), "model.diffusion_model.out.0.weight": torch.zeros(1)}
    assert f"{prefix}decoder.up.2.block.0.norm1.weight" in held
    assert held[f"{prefix}encoder.mid.attn_1.q.weight"].shape == (24, 24, 1, 1)
    torch.save({"state_dict": held}, tmp_path / "ldm.ckpt")
    loaded = sd(tmp_path / "ldm.ckpt", widths=(8, 16, 24), attention_levels=[1])
    assert loaded.fingerprint == source.fingerprint


def test_old_and_new_diffusers_files_load(tmp_path):
    source = sd()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in source.state_dict().items():
        for new_name, old_name in names.items():
            key = key.replace(new_name, old_name)
        old[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, tmp_path / "old.safetensors")
    save_file(source.state_dict(), tmp_path / "new.safetensors")
    for name in ("old", "new"):
        assert sd(tmp_path / f"{name}.safetensors").fingerprint == source.fingerprint


def test_house_keys_pass_unchanged():
    state = sd().state_dict()
    assert to_house(state).keys() == state.keys()


def test_missing_file_names_key_path_and_nearest(tmp_path, small):
    small.save(tmp_path / "openmoji.safetensors", PROVENANCE)
    with pytest.raises(UserError, match=r"autoencoder\.weights: no file '.*openmojis\.safetensors'") as caught:
        SmallKLAutoencoder(weights=tmp_path / "openmojis.safetensors", width=16)
    assert "Did you mean 'openmoji.safetensors'?" in str(caught.value)
    assert "'random'" in str(caught.value)
    with pytest.raises(UserError, match=r"autoencoder\.weights: not set"):
        sd(None)


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.pt"])
def test_torn_file_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"autoencoder\.weights: '.*torn.*' cannot be read") as caught:
        sd(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_architecture_names_the_first_difference(tmp_path, small):
    path = tmp_path / "small.safetensors"
    small.save(path, PROVENANCE)
    with pytest.raises(UserError, match=r"is of another architecture: '\w+\.0\.(bias|weight)' is 48.* in the file, 96"):
        SmallKLAutoencoder(weights=path, width=32)
    with pytest.raises(UserError, match="absent in"):
        sd(path)
