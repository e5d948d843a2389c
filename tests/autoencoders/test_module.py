"""The LightningModule that trains an autoencoder."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.reconstruction_grid import ReconstructionGrid
from callbacks.reconstruction_scores import ReconstructionScores
from lightning_modules.autoencoder import AutoencoderModule
from repalign.autoencoders.discriminator import PatchDiscriminator
from repalign.autoencoders.pixels import Pixels
from repalign.autoencoders.small_kl import SmallKLAutoencoder
from repalign.autoencoders.vq import VQAutoencoder
from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.suite import FeatureMetrics
from repalign.objectives.adversarial import Adversarial
from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstruction
from repalign.objectives.regularizers import CodebookRegularizer, KLRegularizer
from repalign.training.phase import Phase
from repalign.training.schedule import WarmupCosine, warmup_cosine
from tasks.train import BY_HAND
from tests.autoencoders.test_autoencoders import vq
from tests.metrics.small import SmallNetwork

PICTURES = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Data(pl.LightningDataModule):
    """Eight pictures in batches of four."""

    image_size, batch_size, fingerprint, attribution = 16, 4, "eight", "CC0"
    dataset = PICTURES

    def train_dataloader(self):
        rows = [{"image": PICTURES[i], "serial": torch.tensor(i)} for i in range(8)]
        return DataLoader(rows, batch_size=4)

    def images(self, indices):
        return PICTURES[list(indices)]

    def reference_images(self, batch_size):
        yield from (PICTURES.float() / 255).split(batch_size)


def module(seed=0):
    torch.manual_seed(0)
    return AutoencoderModule(
        autoencoder=SmallKLAutoencoder(weights="random", width=16),
        objective=FirstStage(
            reconstruction=Reconstruction(mse=1.0, regularizer=KLRegularizer(weight=1e-3, reduction="mean"))
        ),
        phases={
            "autoencoder": Phase(
                trains=["autoencoder"],
                optimizer=partial(torch.optim.AdamW, lr=1e-2),
                scheduler=partial(warmup_cosine, steps=12, warmup=2),
                clip=1.0,
            )
        },
        seed=seed,
    )


def features():
    return FeatureMetrics(SmallNetwork(), {"fd": FrechetDistance()})


def fit(trained, folder, steps=12):
    trained.run_dir = folder
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ReconstructionGrid(every=8, columns=4, rows=2),
            ReconstructionScores(every=8, metrics=features(), cache=str(folder), batch_size=3),
        ],
        **BY_HAND,
    )
    trainer.fit(trained, datamodule=Data())


# Lightning's advice on things that are as they are on purpose.
quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*log_every_n_steps.*",
    "ignore:.*overridden `transfer_batch_to_device`.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*in eval mode at the start of training.*",
)


@quiet
def test_trains_and_exports(tmp_path, capsys):
    trained = module()
    untrained = copy.deepcopy(trained.autoencoder)
    fit(trained, tmp_path)
    assert trained.progress.step == 12
    assert {
        "train/loss",
        "train/l1",
        "train/mse",
        "train/kl",
        "train/grad_norm/autoencoder",
    } <= trained.finished_terms.keys()

    loaded = SmallKLAutoencoder(weights=tmp_path / "autoencoder.safetensors", width=16).eval()
    images = PICTURES.float() / 255
    before = (untrained.decode(untrained.encode(images).mean) - images).abs().mean()
    after = (loaded.decode(loaded.encode(images).mean) - images).abs().mean()
    assert after < before
    assert after.item() == pytest.approx(loaded.provenance["l1"], abs=1e-3)
    assert loaded.provenance["steps"] == 12 and loaded.provenance["licence"] == "CC0"
    assert loaded.provenance["optimizer"] == {"class": "AdamW", "lr": 1e-2}
    latent = loaded.norm.normalize(loaded.encode(images).mean)
    assert latent.mean((0, 2, 3)).abs().max() < 1e-2
    scored = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in scored] == ["0", "8", "12"]
    assert all(f"| {name} " in line for line in scored for name in ("psnr", "ssim", "fd"))
    with Image.open(tmp_path / "samples" / "step_000012_raw.png") as grid:
        assert grid.size == (4 * 18 + 2, 4 * 18 + 2)


@quiet
def test_a_codebook_and_a_discriminator_train_in_one_round(tmp_path):
    torch.manual_seed(0)
    adversary = Adversarial(discriminator=PatchDiscriminator(width=4, layers=1), start=2)
    objective = FirstStage(reconstruction=Reconstruction(regularizer=CodebookRegularizer()), adversarial=adversary)
    make = partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9))
    phases = {
        "autoencoder": Phase(trains=["autoencoder"], optimizer=make),
        "discriminator": Phase(trains=["discriminator"], optimizer=make, start=adversary.start),
    }
    trained = AutoencoderModule(autoencoder=vq(), objective=objective, phases=phases)
    untouched = copy.deepcopy(trained.discriminator)
    fit(trained, tmp_path / "before", steps=2)
    for name, value in trained.discriminator.named_parameters():
        assert torch.equal(value, untouched.get_parameter(name)), name
    trained = AutoencoderModule(autoencoder=vq(), objective=objective, phases=phases)
    fit(trained, tmp_path / "after", steps=4)
    assert not torch.equal(trained.discriminator.main[0].weight, untouched.main[0].weight)
    assert {
        "train/codebook",
        "train/perplexity",
        "train/codes_used",
        "train/adversarial",
        "train/adversarial_weight",
        "train/loss/discriminator",
        "train/logits_real",
    } <= trained.finished_terms.keys()

    sizes = {"codes": 16, "channels": 4, "widths": (8, 8, 16), "depth": 1, "groups": 4}
    loaded = VQAutoencoder(weights=tmp_path / "after" / "autoencoder.safetensors", norm=None, **sizes).eval()
    images = PICTURES.float() / 255
    raw = loaded.encode(images).mean
    torch.testing.assert_close(raw, trained.autoencoder.encode(images).mean, atol=1e-2, rtol=1e-2)
    assert len(loaded.provenance["latent_std"]) == 4
    assert loaded.provenance["objective"]["adversarial"]["start"] == 2


def test_needs_weights_to_train():
    with pytest.raises(UserError, match="AutoencoderModule: Pixels has no weights to train; set autoencoder=small_kl"):
        AutoencoderModule(autoencoder=Pixels(), objective=module().objective, phases=module().phases)


def test_phases_and_adversarial_term_go_together():
    plain = module()
    phases = {**plain.phases, "discriminator": Phase(trains=["discriminator"], optimizer=torch.optim.AdamW)}
    with pytest.raises(UserError, match="set method=autoencoder for an objective without one"):
        AutoencoderModule(autoencoder=plain.autoencoder, objective=plain.objective, phases=phases)


def test_warmup_then_cosine():
    factors = [WarmupCosine(steps=12, warmup=2, floor=0.1)(step) for step in range(13)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[7] == pytest.approx(0.55) and factors[12] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[2:], factors[3:]))
    assert WarmupCosine(steps=1, warmup=0)(0) == 1.0
