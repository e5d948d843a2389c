"""Batches: the same for every number of workers and ranks, mirrored by serial number, without end under Lightning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from datamodules.image_folder import ImageFolderDataModule
from datamodules.synthetic import SHAPES, Shapes, SyntheticDataModule
from repalign.errors import UserError
from repalign.random import SampleRandom
from tests.data.conftest import TinyAutoencoder
from tests.data.stores import batches, same


def shapes(**options: object) -> SyntheticDataModule:
    return SyntheticDataModule(**{"batch_size": 12, "image_size": 16, "size": 50, **options})


def test_workers_change_nothing(folder: Path, tmp_path: Path) -> None:
    streams = []
    for workers in (0, 2):
        data = ImageFolderDataModule(
            root=folder,
            image_size=32,
            batch_size=4,
            num_workers=workers,
            horizontal_flip=True,
            keep_images=True,
            cache_root=tmp_path,
        )
        data.attach_cache(TinyAutoencoder())
        streams.append(batches(data, 7))
    assert all(same(one, two) for one, two in zip(*streams, strict=True))
    assert {"image", "moments_mean", "moments_std", "label", "serial", "index"} == streams[0][0].keys()


def test_ranks_share_the_step() -> None:
    alone = batches(shapes(horizontal_flip=True), 3)
    shares = []
    for rank in range(3):
        data = shapes(horizontal_flip=True, accumulate=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        shares.append(batches(data, 6))
    for step in range(3):
        parts = [share[2 * step + micro] for micro in range(2) for share in shares]
        joined = {k: torch.cat([p[k] for p in parts]) for k in ("image", "label", "serial", "index")}
        assert all(torch.equal(joined[k], alone[step][k]) for k in joined)


def test_flip_is_a_function_of_the_serial_number() -> None:
    flipped = []
    for batch in batches(shapes(horizontal_flip=True, seed=5), 8):
        mirror = SampleRandom(5, batch["serial"].tolist()).uniform("flip") < 0.5
        plain = Shapes(50, 16).load(batch["index"].tolist())[0]
        for pixels, original, flip in zip(batch["image"], torch.from_numpy(plain), mirror, strict=True):
            assert torch.equal(pixels, original.flip(-1) if flip else original)
        flipped.append(mirror.float().mean())
    assert 0.3 < torch.stack(flipped).mean() < 0.7


def test_resumed_stream_and_untouched_global_generator() -> None:
    whole = batches(shapes(horizontal_flip=True), 9)
    data = shapes(horizontal_flip=True)
    data.set_start(5)
    state = torch.get_rng_state()
    assert all(same(one, two) for one, two in zip(batches(data, 4), whole[5:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


class Recorder(pl.LightningModule):
    """Notes which samples it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return self.weight * batch["image"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_lightning_sees_no_epochs(tmp_path: Path) -> None:
    """13 steps pass three boundaries of the permutation; only the number of steps ends the run."""
    module = Recorder()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=13, max_epochs=-1, default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(module, datamodule=shapes())
    assert trainer.global_step == 13 and trainer.current_epoch <= 1
    assert module.seen == [batch["index"].tolist() for batch in batches(shapes(), 13)]


def test_all_pictures_for_metrics() -> None:
    data = shapes(horizontal_flip=True)
    whole = torch.cat(list(data.reference_images(7)))
    assert whole.shape == (50, 3, 16, 16) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() <= 1
    assert torch.equal(whole, data.images(range(50)).float() / 255)
    assert len(data.dataset) == 50 and data.fingerprint == data.source.fingerprint


def test_shapes_are_distinct_and_stable() -> None:
    source = Shapes(40, 32)
    images, _ = source.load(range(40))
    assert len({picture.tobytes() for picture in images}) == 40
    assert (Shapes(40, 32).load([7])[0] == images[7:8]).all()
    assert (Shapes(40, 32, seed=1).load([7])[0] != images[7:8]).any()
    assert set(source.class_names) == set(SHAPES) and source.captions[1] == f"a {source.class_names[1]}"


@pytest.mark.parametrize(
    "options,words",
    [
        ({"image_size": 0}, "data.image_size: expected 1 or more, found 0"),
        ({"accumulate": 0}, "data.accumulate"),
        ({"num_workers": -1}, "data.num_workers: expected 0 or more"),
        ({"verify": "hsah"}, "data.verify.*Did you mean 'hash'"),
        ({"latent_dtype": "bfloat16"}, "data.latent_dtype.*float32"),
        ({"feature_dtype": "float61"}, "data.feature_dtype.*Did you mean 'float16'"),
    ],
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        shapes(**options)


def test_too_few_pictures() -> None:
    with pytest.raises(UserError, match="data.size"):
        Shapes(3, 16)
