"""Every sampler draws from every backbone, guided; those that share a carry ask for one."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.random import SampleRandom
from repalign.samplers.similarity import write_similarity
from repalign.training.generate import asked_by
from tasks.build import assemble
from tasks.instantiate import build
from tasks.launch import choices, compose
from tests.compatibility.matrix import CAPTIONS, SAMPLES, combination, configuration, options

pytestmark = pytest.mark.xdist_group("samplers")

STEPS = 4
DISCRETE = ("ddpm", "ddpm_fixed", "ddim", "ldm_ddim", "plms", "dpm_solver")  # walk the steps of the discrete path
SAMPLERS = tuple(name for name in choices("sampler") if name not in DISCRETE)
SHARING = tuple(name for name in SAMPLERS if "shared" in name)


@cache
def module(architecture: str):
    """An untrained network whose weights are off their zeros."""
    chosen = combination({"backbone": architecture})
    made = assemble(configuration(chosen)).module.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.trained["backbone"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def sampler(name: str, tmp_path):
    """As composed, in few steps."""
    cfg = compose([f"sampler={name}"])
    if "steps" in cfg.sampler:
        cfg.sampler.steps = STEPS
    if name == "ddt_shared_statistical":
        file = tmp_path / "similarity.safetensors"
        write_similarity(file, torch.eye(STEPS), {})
        cfg.sampler.schedule.similarity = str(file)
        cfg.sampler.schedule.rate = 2
    return build(cfg.sampler, "sampler")


def draw(architecture: str, name: str, tmp_path) -> torch.Tensor:
    own = module(architecture)
    own.sampler = sampler(name, tmp_path)
    own.guidance = ClassifierFreeGuidance(2.0, (0.0, 0.7), open_interval=True)
    wanted = CAPTIONS if asked_by(own.conditioner) == "caption" else torch.arange(SAMPLES)
    return own.generator(ema=False)(wanted, SampleRandom(0, range(SAMPLES)))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SHARING])
def test_every_sampler_draws_from_every_backbone(name, tmp_path):
    for architecture in options("backbone"):
        images = draw(architecture, name, tmp_path)
        assert images.shape == (SAMPLES, 3, 32, 32) and torch.isfinite(images).all(), architecture


@pytest.mark.parametrize("name", SHARING)
def test_sharing_is_for_backbones_with_a_carry(name, tmp_path):
    shared = 0
    for architecture in options("backbone"):
        if module(architecture).backbone.uses_carry:
            shared += 1
            assert torch.isfinite(draw(architecture, name, tmp_path)).all()
        else:
            with pytest.raises(UserError, match="only a backbone with a carry can share it") as error:
                draw(architecture, name, tmp_path)
            assert "\n" not in str(error.value)
    assert shared > 0


def test_the_few_step_presets_are_there():
    assert {"multistep_5", "multistep_10", "multistep_12"} <= set(SAMPLERS)
    for name in ("multistep_5", "multistep_10", "multistep_12"):
        cfg = compose([f"sampler={name}"]).sampler
        assert (cfg.steps, cfg.order, cfg.shift) == (int(name.rpartition("_")[2]), 2, 2.0)
