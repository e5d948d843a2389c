"""Layers of the improved transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from repalign.nn.attention import SelfAttention
from repalign.nn.embed import TimeEmbedding, sinusoid
from repalign.nn.improved import ImprovedBlock, LinearModulation, SwiGLU
from repalign.nn.norm import RMSNorm
from repalign.nn.rotary import Rotary2d, rotary_angles
from repalign.nn.token_io import PatchEmbed


def test_rms_norm_is_torchs_in_float32_and_rounds_before_the_weight_in_bfloat16():
    x = torch.randn(3, 5, 16)
    norm = RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6))
    half, wide = x.bfloat16(), x.bfloat16().float()
    expected = F.rms_norm(wide, (16,), eps=1e-6).bfloat16() * norm.weight.bfloat16()
    assert torch.equal(norm.bfloat16()(half), expected)


def test_rotation_keeps_norms_and_products_depend_on_the_offset_alone():
    torch.manual_seed(0)
    rotary = Rotary2d(8, (5, 5))
    q, k = torch.randn(2, 1, 1, 1, 8)
    every_q, every_k = rotary(q.expand(1, 1, 25, 8)), rotary(k.expand(1, 1, 25, 8))
    torch.testing.assert_close(every_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 25))
    products = (every_q[0, 0] @ every_k[0, 0].T).reshape(5, 5, 5, 5)  # row, column of q; row, column of k
    torch.testing.assert_close(products[1, 2, 0, 3], products[3, 1, 2, 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products[4, 4, 2, 1], products[2, 3, 0, 0], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(products[1, 2, 0, 3], products[1, 2, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_real_arithmetic_for_compilers_equals_complex_products(dtype, monkeypatch):
    rotary, q = Rotary2d(8, (5, 5)).to(dtype), torch.randn(2, 25, 3, 8, dtype=dtype).transpose(1, 2)
    plain = rotary(q)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotary(q), plain)
    assert plain.dtype == dtype and plain.stride() == q.stride()


def test_rotary_positions_span_the_same_extent_on_every_grid():
    coarse, fine = rotary_angles(8, (3, 3)).reshape(3, 3, -1), rotary_angles(8, (5, 5)).reshape(5, 5, -1)
    torch.testing.assert_close(fine[::2, ::2], coarse)
    assert coarse[2, 1, :2].tolist() == [8.0, 16.0]  # column 1 of 3 is x = 8, row 2 of 3 is y = 16
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_angles(6, (2, 2))


def test_attention_with_equal_rotations_is_attention_without():
    attention = SelfAttention(16, 2, qk_norm=True, norm=RMSNorm, qkv_bias=False)
    x = torch.randn(2, 5, 16)
    assert attention.qkv.bias is None and isinstance(attention.q_norm, RMSNorm)
    torch.testing.assert_close(attention(x, rotary=lambda q: -q), attention(x))


def test_swiglu_and_block_have_the_papers_width():
    assert SwiGLU(16, 42).w2.weight.shape == (16, 42)
    assert ImprovedBlock(32, 2).mlp.w1.weight.shape == (85, 32)


def test_modulation_per_token_equals_modulation_per_sample_when_tokens_agree():
    modulation = LinearModulation(8, 3)
    c = torch.randn(2, 1, 8)
    for one, many in zip(modulation(c), modulation(c.expand(2, 5, 8)), strict=True):
        torch.testing.assert_close(one.expand(2, 5, 8), many)
    block, rotary, x = ImprovedBlock(8, 2), Rotary2d(4, (1, 5)), torch.randn(2, 5, 8)
    torch.testing.assert_close(block(x, c, rotary), block(x, c.expand(2, 5, 8), rotary))


def test_patch_embedding_flattens_channel_first():
    embed = PatchEmbed((3, 4, 6), 2, 8)
    x = torch.randn(2, 3, 4, 6)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)
    torch.testing.assert_close(embed(x), patches @ embed.weight.flatten(1).T + embed.bias)
    with pytest.raises(ValueError, match=r"backbone\.patch"):
        PatchEmbed((3, 4, 5), 2, 8)


def test_slowest_frequency_is_almost_one_over_the_period():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert sinusoid(t, 6, 10.0)[:, 0].tolist() == pytest.approx(torch.cos(t).tolist())
    torch.testing.assert_close(sinusoid(t, 256, 10.0)[:, 127], torch.cos(t * 10 ** (-127 / 128)))
    assert TimeEmbedding(8, max_period=10.0)(t).shape == (3, 8)
