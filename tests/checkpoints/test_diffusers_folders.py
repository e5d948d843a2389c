"""Our exports, loaded by diffusers: the same outputs, and the same latents as our sampler's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from repalign.backbones.cross_dit import CrossDiT
from repalign.backbones.dit import DiT
from repalign.backbones.mmdit import MMDiT
from repalign.checkpoints.cross_dit import PixArtAdapter, PixArtDiffusersAdapter
from repalign.checkpoints.dit_diffusers import DiTDiffusersAdapter
from repalign.checkpoints.sd3 import PREFIX, SD3Adapter, SD3DiffusersAdapter
from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.nn.cross import PooledModulation, SharedModulation
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.euler import Euler
from repalign.samplers.field import DenoisingField
from repalign.state import Cond, Tokens
from tasks.convert_diffusers import CONFIGS, dit_config, pixart_config, read_folder, sd3_config, write_folder

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def filled(make) -> nn.Module:
    torch.manual_seed(0)
    net = make().eval().requires_grad_(False)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def mmdit(**options):
    sizes = {"patch": 2, "depth": 3, "dim": 24, "heads": 3, "table_side": 6}
    return MMDiT((4, 8, 8), 20, 10, **{**sizes, **options})


def cross(**options):
    return CrossDiT((4, 8, 8), 20, None, patch=2, dim=24, depth=2, heads=3, **options)


def text(batch: int = 2, pooled: bool = True) -> Cond:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(batch, 5, 20, generator=generator)
    mask = torch.arange(5).expand(batch, 5) < 4
    return Cond(text=Tokens(states), pooled=torch.randn(batch, 10, generator=generator), text_mask=mask)


def loaded(kind: str, folder, config, state):
    diffusers = pytest.importorskip("diffusers")
    write_folder(folder, config, state)
    return getattr(diffusers, kind).from_pretrained(folder).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "dual_blocks": (1, 2)}, {"table_side": 8, "table_spacing": 0.5}]
)
def test_sd3_transformer(options, tmp_path):
    net = filled(partial(mmdit, **options))
    state = SD3DiffusersAdapter().to_official({"backbone": net.state_dict()})
    theirs = loaded("SD3Transformer2DModel", tmp_path / "x", sd3_config(net), state)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), text()
    expected = theirs(x, cond.text.data, cond.pooled, 1000 * t).sample
    torch.testing.assert_close(net(x, t, cond).pred, expected, **CLOSE)
    back = SD3DiffusersAdapter().from_official(read_folder(tmp_path / "x"))["backbone"]
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


@pytest.mark.slow
def test_the_pipeline_of_diffusers_draws_our_latents(tmp_path):
    """Flow-match scheduler, shift 3, guidance 4.5, six steps."""
    diffusers = pytest.importorskip("diffusers")
    net = filled(partial(mmdit, qk_norm=True))
    state = SD3DiffusersAdapter().to_official({"backbone": net.state_dict()})
    transformer = loaded("SD3Transformer2DModel", tmp_path / "x", {**sd3_config(net), "sample_size": 8}, state)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    noise, cond = torch.randn(2, 4, 8, 8), text()
    null = Cond(text=Tokens(-cond.text.data), pooled=-cond.pooled, text_mask=cond.text_mask)
    theirs = pipeline(
        prompt_embeds=cond.text.data,
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds=null.text.data,
        negative_pooled_prompt_embeds=null.pooled,
        latents=noise,
        num_inference_steps=6,
        guidance_scale=4.5,
        height=64,
        width=64,
        output_type="latent",
    ).images

    def bind(condition):
        return DenoisingField(net, LinearPath(), Velocity(), condition)

    sampler = Euler(6, shift=3.0, last_step_size=0.003 / 1.002)
    ours = sampler(ClassifierFreeGuidance(4.5)(bind, cond, null), noise, SampleRandom(0, range(2)))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"variance_head": True, "modulation": partial(SharedModulation, size=True), "interpolation": 2.0}]
)
def test_pixart_transformer(options, tmp_path):
    net = filled(partial(cross, **options))
    state = PixArtDiffusersAdapter().to_official({"backbone": net.state_dict()})
    theirs = loaded("PixArtTransformer2DModel", tmp_path / "x", pixart_config(net), state)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), text()
    sizes = {"resolution": None, "aspect_ratio": None}
    if "modulation" in options:
        sizes = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.tensor([[1.0]] * 2)}
        cond = Cond(cond.label, cond.text, None, text_mask=cond.text_mask, size=torch.tensor([[64.0, 64.0, 1.0]] * 2))
    out = net(x, t, cond)
    expected = theirs(
        x, cond.text.data, timestep=1000 * t, added_cond_kwargs=sizes, encoder_attention_mask=cond.text_mask.long()
    ).sample
    torch.testing.assert_close(torch.cat([out.pred, *out.heads.values()], 1), expected, **CLOSE)
    back = PixArtDiffusersAdapter().from_official(read_folder(tmp_path / "x"))["backbone"]
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("variance", [False, True])
def test_dit_transformer(variance, tmp_path):
    """The same up to the frequencies of the time, which diffusers spaces otherwise; here they are the official ones."""
    net = filled(lambda: DiT((4, 8, 8), 5, patch=2, dim=24, depth=2, heads=3, variance_head=variance))
    adapter = DiTDiffusersAdapter(net.pos_embed)
    state = adapter.to_official({"backbone": net.state_dict()})
    theirs = loaded("DiTTransformer2DModel", tmp_path / "x", dit_config(net), state)
    for block in theirs.transformer_blocks:
        assert block.norm1.emb.time_proj.downscale_freq_shift == 1
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, steps, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 5])
    out = net(x, steps.float(), Cond(label=label))
    expected = theirs(x, timestep=steps, class_labels=label).sample
    torch.testing.assert_close(torch.cat([out.pred, *out.heads.values()], 1), expected, **CLOSE)
    back = adapter.from_official(read_folder(tmp_path / "x"))["backbone"]
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("adapter", "make"),
    [
        (SD3Adapter(), partial(mmdit, qk_norm=True, dual_blocks=(1,))),
        (SD3Adapter(PREFIX), mmdit),
        (SD3DiffusersAdapter(), partial(mmdit, qk_norm=True, dual_blocks=(1,))),
        (PixArtAdapter(), partial(cross, modulation=partial(SharedModulation, size=True))),
        (PixArtDiffusersAdapter(), cross),
    ],
)
def test_round_trip(adapter, make):
    state = filled(make).state_dict()
    official = adapter.to_official({"backbone": state})
    back = adapter.from_official(official)["backbone"]
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_a_single_file_holds_other_networks_too():
    state = filled(mmdit).state_dict()
    official = {**SD3Adapter(PREFIX).to_official({"backbone": state}), "first_stage_model.x": torch.zeros(1)}
    assert SD3Adapter().from_official(official)["backbone"].keys() == state.keys()


def test_a_part_that_is_missing_says_so():
    official = SD3DiffusersAdapter().to_official({"backbone": filled(mmdit).state_dict()})
    del official["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(UserError, match=r"'blocks.1.image.attention.qkv.weight' has 2 of 3 parts"):
        SD3DiffusersAdapter().from_official(official)


def test_differing_embedders_of_dit_say_so():
    net = filled(lambda: DiT((4, 8, 8), 5, patch=2, dim=24, depth=2, heads=3))
    official = DiTDiffusersAdapter(net.pos_embed).to_official({"backbone": net.state_dict()})
    official["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    with pytest.raises(UserError, match=r"differs from that of block 0"):
        DiTDiffusersAdapter(net.pos_embed).from_official(official)


@pytest.mark.parametrize(
    ("family", "make", "match"),
    [
        ("sd3_diffusers", cross, r"sd3_diffusers is another network than CrossDiT; compose backbone=mmdit_d24"),
        ("sd3_diffusers", partial(mmdit, mlp_ratio=2.0), r"MLPs are 4 times as wide .*; found 48 for 24"),
        ("pixart_diffusers", mmdit, r"pixart_diffusers is another network than MMDiT"),
        ("pixart_diffusers", partial(cross, cross_norm=True), r"PixArt has adaLN-single"),
        ("pixart_diffusers", partial(cross, qk_norm=True), r"no query-key norm"),
        ("dit_diffusers", mmdit, r"dit_diffusers is another network than MMDiT"),
    ],
)
def test_networks_that_diffusers_cannot_be(family, make, match):
    with pytest.raises(UserError, match=match):
        CONFIGS[family](make())


def test_a_network_without_a_pooled_vector():
    with pytest.raises(UserError, match="diffusers' SD3 has a pooled text vector"):
        sd3_config(MMDiT((4, 8, 8), 20, None, patch=2, depth=1, dim=24, heads=3))
    with pytest.raises(ValueError, match="modulation: needs a pooled text vector"):
        cross(modulation=PooledModulation)


def test_a_folder_that_holds_something_is_kept(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").write_text("")
    with pytest.raises(UserError, match=r"task.output: '.*x' exists; give a new folder"):
        write_folder(tmp_path / "x", {}, {})
    with pytest.raises(UserError, match=r"task.input: no .safetensors"):
        read_folder(tmp_path / "x")
