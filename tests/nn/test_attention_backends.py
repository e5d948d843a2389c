"""Backends of attention agree, with every kind of mask; packed sequences give what each gives alone."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from repalign.errors import UserError
from repalign.nn.attention import CrossAttention, SelfAttention
from repalign.nn.attention_backends import Flex, Packing, XFormers, padded_bias, sdpa
from repalign.nn.blocks import DiTBlock
from repalign.nn.joint import JointBlock
from repalign.nn.spatial_attention import SpatialTransformer
from repalign.training.policies import attend_by, recompute
from tests.training.test_policies import loss_and_gradients, module_of

LENGTHS = (5, 16, 9)


def heads(length=30, keys=30, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, n, 8, generator=generator) for n in (length, keys, keys)]


def plain(q, k, v, mask):
    """Written out."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


MASKS = {
    "none": lambda: None,
    "groups": lambda: (torch.arange(30) % 3 == torch.arange(30)[:, None] % 3).expand(2, 1, 30, 30),
    "heads": lambda: torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(1)) > 0.4,
    "bias": lambda: torch.where(torch.arange(30) < 20, 0.0, -10000.0).expand(2, 1, 1, 30),
}


@pytest.mark.parametrize("backend", [sdpa, Flex()])
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_every_backend_computes_the_formula(backend, name):
    mask = MASKS[name]()
    q, k, v = heads()
    torch.testing.assert_close(backend(q, k, v, mask), plain(q, k, v, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [sdpa, Flex()])
@torch.no_grad()
def test_packed_sequences_see_their_own_alone(backend):
    q, k, v = heads(batch=1)
    packing = Packing(LENGTHS)
    found = backend(q, k, v, packing)
    torch.testing.assert_close(found, plain(q, k, v, packing.mask()), rtol=0, atol=1e-5)
    first = slice(0, LENGTHS[0])
    torch.testing.assert_close(found[:, :, first], plain(q[:, :, first], k[:, :, first], v[:, :, first], None))
    assert not torch.allclose(found, plain(q, k, v, None), atol=1e-2)


def test_a_block_gives_packed_sequences_what_it_gives_them_alone():
    torch.manual_seed(0)
    block = DiTBlock(24, 3, qk_norm=True)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    sequences = [torch.randn(n, 24) for n in LENGTHS]
    conditions = torch.randn(len(LENGTHS), 24)
    row, packing = Packing.of(sequences)
    assert packing == Packing(LENGTHS)
    together = packing.split(block(row, packing.spread(conditions), packing))
    for sequence, condition, found in zip(sequences, conditions, together, strict=True):
        torch.testing.assert_close(found, block(sequence[None], condition[None])[0], rtol=1e-5, atol=1e-5)
    # The gradient of one sequence's result does not reach the others.
    row = row.requires_grad_()
    packing.split(block(row, packing.spread(conditions), packing))[1].sum().backward()
    first, second, third = (part.abs().max() for part in packing.split(row.grad))
    assert first == 0 and third == 0 and second > 0


@pytest.mark.parametrize(
    "recipe", ["repa_sit_s", "ddt_b", "sd3_d15", "cross_dit_embedded", "ldm_text", "sra_dts_sit_b"]
)
def test_the_policy_reaches_every_attention_of_a_network(recipe):
    module, batch = module_of(recipe)
    expected, _ = loss_and_gradients(module, batch)
    keys, calls = module.state_dict().keys(), []

    def counting(q, k, v, mask=None):
        calls.append(q.shape)
        return sdpa(q, k, v, mask)

    attend_by(module.backbone, counting)
    recompute(module.backbone)
    found, gradients = loss_and_gradients(module, batch)
    assert torch.equal(found, expected) and gradients
    assert len(calls) > len(module.backbone.units)  # forward, and again in the backward pass
    assert module.state_dict().keys() == keys
    with torch.no_grad():
        attend_by(module.backbone, Flex())
        other = module.training_step(dict(batch), 0)
    torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_attend_by_flex_as_by_sdpa():
    torch.manual_seed(0)
    x, text, c = torch.randn(2, 9, 24), torch.randn(2, 5, 24), torch.randn(2, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    image = torch.randn(2, 32, 3, 3)
    joint = JointBlock(24, 3, qk_norm=True)
    joint.apply(lambda part: [torch.nn.init.normal_(p, std=0.2) for p in part.parameters(recurse=False)] and None)
    layers = [
        (SelfAttention(24, 3, True), (x,)),
        (CrossAttention(24, 3, True), (x, text, mask)),
        (joint, (x, text, c)),
        (SpatialTransformer(32, 24, 4), (image, text)),
    ]
    for layer, inputs in layers:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        expected = layer(*inputs)
        attend_by(layer, Flex())
        torch.testing.assert_close(layer(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_flex_on_a_cpu_is_refused():
    q, k, v = heads()
    with pytest.raises(UserError, match="flex has no backward pass on a CPU; set attention=sdpa"):
        Flex()(q.requires_grad_(), k, v)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_computes_the_formula():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = heads()
    torch.testing.assert_close(torch.compile(flex_attention)(q, k, v), plain(q, k, v, None), rtol=0, atol=1e-5)


def test_a_network_without_attention_is_refused():
    with pytest.raises(UserError, match="has no layer that attends"):
        attend_by(torch.nn.Linear(2, 2), sdpa)  # pyright: ignore[reportArgumentType]


def test_xformers_that_is_missing_or_broken_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"attention: xformers does not load \(ModuleNotFoundError.*attention=sdpa"):
        XFormers()
    with pytest.raises(UserError, match="xformers does not load"):
        module_of("repa_sit_s", "attention=xformers")


def test_masks_as_xformers_takes_them(monkeypatch):
    """Its kernels need a GPU; what is handed to them is computed here by the formula of its documentation."""
    seen = []

    def attention(q, k, v, attn_bias=None):  # [B, N, heads, d]
        assert not isinstance(attn_bias, torch.Tensor) or attn_bias.stride(-2) % 8 == 0
        seen.append(attn_bias)
        given = Packing(tuple(attn_bias)).mask() if isinstance(attn_bias, list) else attn_bias
        return plain(*(x.transpose(1, 2) for x in (q, k, v)), given).transpose(1, 2)

    ops, masks = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = attention
    masks.BlockDiagonalMask = types.SimpleNamespace(from_seqlens=lambda lengths: list(lengths))
    for module in (types.ModuleType("xformers"), ops, types.ModuleType("xformers.ops.fmha"), masks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    backend = XFormers()
    with pytest.raises(UserError, match="xformers has no kernel for a CPU"):
        backend(*heads())
    monkeypatch.setattr(torch.Tensor, "device", types.SimpleNamespace(type="cuda"))
    masks_of = {name: make() for name, make in MASKS.items()}
    found = {name: backend(*heads(), mask) for name, mask in masks_of.items()}
    packed = backend(*heads(batch=1), Packing(LENGTHS))
    monkeypatch.undo()
    for name, mask in masks_of.items():
        torch.testing.assert_close(found[name], plain(*heads(), mask), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, plain(*heads(batch=1), Packing(LENGTHS).mask()), rtol=0, atol=1e-5)
    assert seen[-1] == list(LENGTHS)


def test_biases_keep_their_rows_aligned():
    q, k, _ = heads(7, 13)
    mask = torch.rand(2, 1, 7, 13) > 0.5
    bias = padded_bias(mask, q, k)
    assert bias.shape == (2, 3, 7, 13) and bias.stride(-2) == 16
    assert torch.equal(bias == 0, mask.expand(2, 3, 7, 13)) and bias[~mask.expand(2, 3, 7, 13)].max() == -torch.inf
    numbers = F.pad(torch.randn(2, 1, 1, 12), (0, 1))
    assert torch.equal(padded_bias(numbers, q, k), numbers.expand(2, 3, 7, 13))


@pytest.mark.filterwarnings("ignore")
def test_the_mask_of_xformers_itself():
    pytest.importorskip("xformers.ops", reason="the extra xformers is not installed")
    q, k, _ = heads(batch=1)
    theirs = XFormers().bias(Packing(LENGTHS), q, k).materialize((30, 30))
    assert torch.equal(theirs == 0, Packing(LENGTHS).mask()[0, 0])
