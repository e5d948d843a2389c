"""The recipes of REPA-E against the paper's hyperparameters, and its tables as sweeps."""

from pathlib import Path

import pytest
import yaml

from tasks.launch import compose

CONF = Path(__file__).parents[2] / "conf"
SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}
VAES = {"": (4, 4, 2), "_in_vae": (32, 5, 1), "_va_vae": (32, 5, 1)}  # channels, levels, patch


@pytest.fixture(autouse=True)
def data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))


@pytest.mark.parametrize("vae", VAES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_goes_with_every_autoencoder(size, vae):
    cfg = compose([f"experiment=repa_e_sit_{size}{vae}"])
    (dim, depth), (channels, levels, patch) = SIZES[size], VAES[vae]
    assert (cfg.backbone.dim, cfg.backbone.depth, cfg.backbone.patch) == (dim, depth, patch)
    assert (cfg.autoencoder.channels, len(cfg.autoencoder.widths)) == (channels, levels)
    assert (cfg.autoencoder.norm.momentum, cfg.autoencoder.norm.eps) == (0.1, 1e-4)


@pytest.mark.parametrize(
    "recipe", ["repa_e_sit_xl", "repa_e_sit_xl_scratch", "repa_e_sit_l_512", "repa_e_sit_s_va_vae"]
)
def test_hyperparameters_are_the_papers(recipe):
    cfg = compose([f"experiment={recipe}"])
    method, stage = cfg.method, cfg.method.first_stage
    assert list(method.phases) == ["autoencoder", "discriminator", "denoiser"]
    for phase in method.phases.values():
        assert (phase.optimizer.lr, list(phase.optimizer.betas), phase.optimizer.weight_decay) == (
            1e-4,
            [0.9, 0.999],
            0,
        )
        assert (phase.clip, phase.scheduler, phase.get("start", 0)) == (1.0, None, 0)
    assert (method.alignment, method.diffusion) == (1.5, 0.0)
    assert (cfg.align.weight, cfg.align.tap, cfg.align.hidden) == (0.5, "block.8", 2048)
    assert (stage.reconstruction.l1, stage.reconstruction.perceptual_weight) == (1.0, 1.0)
    assert stage.reconstruction.regularizer.weight == 1e-6 and stage.reconstruction.regularizer.reduction == "sum"
    adversarial = stage.adversarial
    assert (adversarial.weight, adversarial.factor, adversarial.start, adversarial.adaptive) == (0.1, 1.0, 0, False)
    assert (cfg.data.batch_size, cfg.steps, cfg.ema.decay, cfg.conditioner.drop) == (256, 400000, 0.9999, 0.1)
    # As published; each is corrected by one word (docs/repa_e.md).
    assert cfg.backbone.train_positions and stage.reconstruction.perceptual.double_scaling
    assert not cfg.autoencoder.norm.eps_at_decode


def jobs(sweep):
    params = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
    ((key, values),) = params.items()
    base = [] if key == "experiment" else ["experiment=repa_e_sit_l"]
    return [[*base, f"{key}={value}"] for value in values.split(",")]


@pytest.mark.parametrize("sweep", sorted(p.stem for p in (CONF / "sweep").glob("repa_e_*.yaml")))
def test_every_row_of_the_papers_tables_composes(sweep):
    found = [compose([*words, f"sweep={sweep}", "steps=100000"]) for words in jobs(sweep)]
    assert len({str(cfg) for cfg in found}) == len(found) >= 3
