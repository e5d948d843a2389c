"""LDM's files of VQ autoencoders."""

import torch

from repalign.autoencoders.vq import VQAutoencoder
from repalign.autoencoders.vq_keys import from_ldm, to_ldm
from tests.autoencoders.test_autoencoders import vq


def test_ldm_keys_and_back(tmp_path):
    torch.manual_seed(0)
    autoencoder = vq(attention_levels=[2], z_channels=5)
    own = autoencoder.state_dict()
    official = to_ldm(own)
    assert official["quantize.embedding.weight"].shape == (16, 4)
    assert official["encoder.down.2.attn.0.q.weight"].shape == (16, 16, 1, 1)
    # LDM counts the decoder's levels from full resolution.
    assert official["decoder.up.0.block.0.conv1.weight"].shape[0] == 8
    assert {"decoder.up.2.upsample.conv.weight", "encoder.mid.attn_1.proj_out.bias"} <= official.keys()
    back = from_ldm(official)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    assert from_ldm(own).keys() == own.keys()

    whole = {f"first_stage_model.{key}": value for key, value in official.items()}
    whole |= {"model.diffusion_model.out.2.weight": torch.ones(1), "first_stage_model.loss.logvar": torch.ones(1)}
    torch.save({"state_dict": whole}, tmp_path / "model.ckpt")
    loaded = VQAutoencoder(
        weights=tmp_path / "model.ckpt",
        norm=None,
        codes=16,
        channels=4,
        widths=(8, 8, 16),
        depth=1,
        groups=4,
        attention_levels=[2],
        z_channels=5,
    )
    assert loaded.fingerprint == autoencoder.fingerprint
