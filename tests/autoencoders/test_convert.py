"""Published layouts of KL autoencoders, in and out."""

import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from repalign.autoencoders.diffusers_folder import norm_entries, write_folder
from repalign.autoencoders.kl_keys import to_diffusers, to_house, to_ldm
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift, Statistics, statistics_from_file
from repalign.autoencoders.running_norm import RunningStatistics
from repalign.autoencoders.weights import tensors_of
from repalign.errors import UserError
from tasks import convert
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import compose
from tests.autoencoders.test_weights import ldm_layout

SIZES = {"widths": [8, 8, 16], "depth": 1, "groups": 4, "attention_levels": [2]}
LAYOUTS = {
    "f4 with attention": SIZES,
    "sd": {"widths": [8, 16], "depth": 1, "groups": 4},
    "sd3": {"channels": 16, "widths": [8, 16], "depth": 1, "groups": 4, "quant": False},
}
WORDS = [f"autoencoder.{key}={value}" for key, value in SIZES.items() if key != "attention_levels"]
WORDS += ["+autoencoder.attention_levels=[2]"]


def sd(norm=None, **sizes):
    torch.manual_seed(0)
    return SDAutoencoder(weights="random", norm=norm or ScaleShift(0.18215), **(sizes or SIZES)).eval()


def equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_layouts_come_back_exactly(name):
    autoencoder = sd(**LAYOUTS[name])
    ours = tensors_of(autoencoder)
    equal(to_ldm(ours), ldm_layout(ours, len(LAYOUTS[name]["widths"])))
    equal(to_house(to_ldm(ours)), ours)
    equal(to_house(to_diffusers(ours)), ours)
    equal(to_diffusers(ours), autoencoder.network.state_dict())


def test_published_keys_of_the_f16_layout():
    """REPA-E's names: attention at the last level, twice in the encoder and three times in the decoder."""
    with torch.device("meta"):
        autoencoder = SDAutoencoder(
            weights="random", norm=None, channels=32, widths=[128, 128, 256, 256, 512], attention_levels=[4]
        )
        shapes = {key: tuple(value.shape) for key, value in to_ldm(tensors_of(autoencoder)).items()}
    assert shapes["encoder.down.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.4.attn.2.q.bias"] == (512,)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.up.0.block.0.conv1.weight"] == (128, 128, 3, 3)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["quant_conv.weight"] == (64, 64, 1, 1) and shapes["decoder.norm_out.bias"] == (128,)
    assert not [key for key in shapes if "resnets" in key or "attentions" in key or "blocks" in key or "to_" in key]


@pytest.mark.parametrize(
    "norm",
    [
        ScaleShift(0.18215),
        ScaleShift(1.5305, 0.0609),
        Statistics([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]),
        RunningStatistics(4, initial=Statistics([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0])),
    ],
    ids=["sd", "sd3", "statistics", "running"],
)
def test_a_folder_is_read_by_diffusers_and_by_us(tmp_path, norm):
    autoencoder = sd(norm)
    write_folder(tmp_path / "vae", autoencoder.network, norm)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae", local_files_only=True).eval()
    equal(theirs.state_dict(), tensors_of(autoencoder))
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        mean = theirs.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(mean, autoencoder.encode(images).mean)
    ours = SDAutoencoder(weights=tmp_path / "vae", norm=statistics_from_file(tmp_path / "vae"), **SIZES)
    assert ours.fingerprint == autoencoder.fingerprint
    raw = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(ours.norm.denormalize(raw), norm.denormalize(raw))


def test_numbers_of_a_norm_in_a_configuration():
    none = {"latents_mean": None, "latents_std": None}
    assert norm_entries(ScaleShift(0.18215)) == {"scaling_factor": 0.18215, "shift_factor": 0.0, **none}
    assert norm_entries(ScaleShift(1.5305, 0.0609)) == {"scaling_factor": 1.5305, "shift_factor": 0.0609, **none}
    assert norm_entries(ScaleShift([0.5, 2.0], 0.25)) == {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": [0.25, 0.25],
        "latents_std": [2.0, 0.5],
    }


def test_a_folder_of_other_sizes_names_the_option(tmp_path):
    write_folder(tmp_path / "vae", sd().network, ScaleShift(1.0))
    for option, value in (("groups", 8), ("channels", 16), ("depth", 2)):
        with pytest.raises(UserError, match=rf"autoencoder\.{option}: {value} here, but .* in '.*config.json'"):
            SDAutoencoder(weights=tmp_path / "vae", norm=None, **{**SIZES, option: value})
    with pytest.raises(UserError, match=r"task\.output: '.*vae' exists"):
        write_folder(tmp_path / "vae", sd().network, ScaleShift(1.0))
    with pytest.raises(UserError, match="export it as ldm_vae"):
        write_folder(tmp_path / "other", sd(**{**SIZES, "z_channels": 5}).network, ScaleShift(1.0))


def run(*words):
    cfg = compose(["task=convert", "autoencoder=sd_vae", *WORDS, *words])
    check_composition(cfg)
    convert.run(cfg)


def test_the_task_goes_through_every_layout_and_back(tmp_path):
    """Own weights -> LDM (.ckpt, .pt, .safetensors) -> own -> diffusers folder -> own: the same tensors."""
    autoencoder = sd()
    own = tmp_path / "run" / "autoencoder.safetensors"
    autoencoder.save(own, {}, torch.float32)
    for ending in ("ckpt", "pt", "safetensors"):
        official, back = tmp_path / f"ldm.{ending}", tmp_path / f"{ending}_back.safetensors"
        run("task.family=ldm_vae", "task.direction=export", f"task.input={own}", f"task.output={official}")
        run("task.family=ldm_vae", f"task.input={official}", f"task.output={back}")
        equal(load_file(back), tensors_of(autoencoder))
    assert "encoder.down.0.block.0.norm1.weight" in torch.load(tmp_path / "ldm.pt", weights_only=True)
    assert list(torch.load(tmp_path / "ldm.ckpt", weights_only=True)) == ["state_dict"]
    # Without an input, the weights of the composition are exported.
    folder, back = tmp_path / "vae", tmp_path / "folder_back.safetensors"
    run("task.family=diffusers_vae", "task.direction=export", f"autoencoder.weights={own}", f"task.output={folder}")
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 0.18215
    run("task.family=diffusers_vae", f"task.input={folder}", f"task.output={back}")
    equal(load_file(back), tensors_of(autoencoder))
    cfg = compose(["autoencoder=sd_vae", *WORDS, f"autoencoder.weights={back}"])
    assert build(cfg.autoencoder, "autoencoder").fingerprint == autoencoder.fingerprint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.family=ldm_vea"], r"task.family: .* 'ldm_vea'. Did you mean 'ldm_vae'"),
        (["task.family=sit"], "task.input: not set"),
        (["task.family=ldm_vae"], "task.input: not set"),
        (["task.family=ldm_vae", "task.direction=exprot"], "task.direction: .* Did you mean 'export'"),
        (["task.family=ldm_vae", "task.direction=export"], "autoencoder.weights: not set"),
        (["task.family=ldm_vae", "task.direction=export", "autoencoder.weights=random"], "task.output: .* ending '.x'"),
        (
            ["task.family=diffusers_vae", "task.direction=export", "autoencoder.weights=random"]
            + ["latent_norm@autoencoder.norm=file"],
            "autoencoder.norm: SDAutoencoder has no latent statistics",
        ),
    ],
)
def test_the_task_says_what_is_wrong(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(f"task.output={tmp_path / 'out.x'}", *words)
    assert not list(tmp_path.iterdir())


def test_the_small_autoencoder_has_no_published_layout(tmp_path):
    cfg = compose(["task=convert", "task.family=ldm_vae", "task.direction=export", f"task.output={tmp_path}/x.pt"])
    with pytest.raises(UserError, match="found SmallKLAutoencoder; set autoencoder=sd_vae"):
        convert.run(cfg)
