"""Pipelines that diffusers cannot express, and folders that are whole or not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repalign.autoencoders.latent_norm import ScaleShift, Statistics
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.backbones.clocks import ReversedClock, unwrapped
from repalign.conditioners.label import LabelConditioner
from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.guidance.skip_layer import SkipLayerGuidance
from repalign.paths.gvp import GVPPath
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Velocity
from repalign.paths.vp import DiscreteVPPath
from repalign.samplers.ddim import DDIM
from repalign.samplers.ddpm import DDPM
from repalign.samplers.dpm_solver import DPMSolverPlusPlus
from repalign.samplers.euler import Euler
from repalign.samplers.heun import Heun
from repalign.samplers.plms import PLMS
from tasks.build import assemble
from tasks.convert_pipeline import PIPELINES, write_pipeline
from tasks.launch import compose
from tests.smoke.test_convert_pipeline import DIT, SD3_EULER, TEXT, VAE


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IMAGENET", "CC12M"):
            patch.setenv(f"REPALIGN_{name}", str(tmp_path_factory.mktemp("data")))
        recipes = {"sd3_pipeline": SD3_EULER, "dit_pipeline": DIT, "ldm_pipeline": TEXT}
        words = {family: ["debug=tiny", *recipe, *VAE] for family, recipe in recipes.items()}
        found = {family: assemble(compose(own)).module.generator() for family, own in words.items()}
    return {
        "sd3_pipeline": found["sd3_pipeline"],
        "dit_pipeline": replace(found["dit_pipeline"], sampler=DDIM("ddim5")),
        "ldm_pipeline": replace(found["ldm_pipeline"], sampler=DDIM("ldm5", end="first_step")),
    }


REFUSALS = [
    ("sd3_pipeline", {"sampler": Heun(5)}, "sampler: .* takes the steps of Euler; .* found Heun"),
    ("sd3_pipeline", {"sampler": Euler(5, shift=3.0)}, "sampler: .* found shift=3, last_step_size=None"),
    ("sd3_pipeline", {"path": GVPPath()}, "path: .* needs path=linear and parametrization=velocity, found GVPPath"),
    ("sd3_pipeline", {"guidance": ClassifierFreeGuidance(2, (0.0, 0.7))}, r"guidance: .* guidance.interval=\[0,1\]"),
    ("sd3_pipeline", {"guidance": SkipLayerGuidance(4.0, 2.5, [1])}, "guidance: .* found SkipLayerGuidance"),
    ("sd3_pipeline", {"autoencoder": SmallKLAutoencoder(weights="random")}, "autoencoder: .* found SmallKLAutoencoder"),
    ("sd3_pipeline", {"norm": Statistics([0.0] * 16, [0.5] * 16)}, "autoencoder.norm: .* one scale and one shift"),
    ("dit_pipeline", {"sampler": DDPM("5")}, "sampler: .* takes the steps of DDIM, PLMS, DPMSolver.* found DDPM"),
    ("dit_pipeline", {"sampler": DDIM("50")}, "sampler.steps: .* every 20th of 1000 .* '50' others; set ddim50"),
    ("dit_pipeline", {"sampler": DDIM("ddim5", eta=1.0)}, "sampler.eta: found 1, .* set sampler.eta=0"),
    ("dit_pipeline", {"sampler": DDIM("ddim5", clip=True)}, "sampler.clip"),
    ("dit_pipeline", {"sampler": DPMSolverPlusPlus(5, spacing="time")}, "sampler.spacing"),
    ("dit_pipeline", {"sampler": PLMS("ldm5"), "parametrization": Data()}, "parametrization: .* PLMS needs"),
    ("dit_pipeline", {"path": DiscreteVPPath(respacing="5")}, "path: .* needs a whole discrete chain"),
    ("dit_pipeline", {"path": LinearPath()}, "path: .* found LinearPath"),
    ("dit_pipeline", {"parametrization": Velocity()}, "parametrization: .* found Velocity"),
    ("dit_pipeline", {"guidance": ClassifierFreeGuidance(2, channels=3)}, "guidance: .* guidance.channels=null"),
    ("dit_pipeline", {"norm": ScaleShift(0.5, 0.1)}, "autoencoder.norm: .* one scale and no shift"),
    ("ldm_pipeline", {"sampler": DDIM("ddim5")}, "sampler: StableDiffusionPipeline sets the offset .*=ldm50"),
    ("ldm_pipeline", {"conditioner": LabelConditioner(5)}, "conditioner: .* reads text, found LabelConditioner"),
]


@pytest.mark.parametrize(("family", "parts", "match"), REFUSALS)
def test_what_diffusers_cannot_express_is_refused_in_one_line(family, parts, match, generators):
    assert PIPELINES[family](generators[family], ["a", "b"]).schedule.steps == 5
    with pytest.raises(UserError, match=f"^{match}"):
        PIPELINES[family](replace(generators[family], **parts), ["a", "b"])


def test_the_clock_must_be_the_schedulers(generators):
    for family, clock in (("sd3_pipeline", ReversedClock), ("dit_pipeline", ReversedClock)):
        backbone = clock(unwrapped(generators[family].backbone))
        with pytest.raises(UserError, match="^clock: .* found ReversedClock"):
            PIPELINES[family](replace(generators[family], backbone=backbone), [])


def test_a_pipeline_that_is_interrupted_leaves_nothing(generators, tmp_path, monkeypatch):
    generator = generators["dit_pipeline"]
    pipeline = PIPELINES["dit_pipeline"](generator, [])
    state = {"transformer_blocks.0.x": torch.zeros(2)}

    def torn(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("tasks.convert_pipeline.write_autoencoder", torn)
        write_pipeline(tmp_path / "pipeline", pipeline, generator, state)
    assert not list(tmp_path.iterdir())
    write_pipeline(tmp_path / "pipeline", pipeline, generator, state)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    with pytest.raises(UserError, match="task.output: .* exists; give a new folder"):
        write_pipeline(tmp_path / "pipeline", pipeline, generator, state)
