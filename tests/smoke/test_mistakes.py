"""Mistakes that only the files or the weights can show: one line, within five seconds of the task's start."""

import importlib
import time
from pathlib import Path

import pytest
from PIL import Image

from callbacks.checkpoint import checkpoints_in
from repalign.errors import UserError
from tasks.check import check_composition
from tasks.launch import compose
from tests.smoke.test_recipes_train import train

SECONDS = 5.0


def complain(tmp_path: Path, *words: str) -> str:
    """The line of a task that must refuse; CPU time, because the tests share the machine."""
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        cfg = compose([*words, "debug=tiny", f"paths.runs={tmp_path}", f"paths.cache={tmp_path}/cache", "run_name=run"])
        check_composition(cfg)
        importlib.import_module(f"tasks.{cfg.task.name}").run(cfg)
    assert time.process_time() - began < SECONDS
    return " ".join(str(caught.value).split())


@pytest.fixture
def folder(tmp_path):
    """A miniature in ImageNet's format: two classes, four pictures each."""
    for name in ("n01", "n02"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (48, 40), (60 * index, 90, 200)).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def on_folder(folder: Path) -> list[str]:
    return [
        "experiment=sit_s",
        "data=image_folder",
        f"data.root={folder}",
        "data.num_workers=0",
        "~data.size",  # of the made-up pictures that debug=tiny has otherwise
    ]


def test_a_picture_that_cannot_be_read_is_named(folder, tmp_path):
    (folder / "n02" / "2.png").write_bytes(b"no picture")
    line = complain(tmp_path, *on_folder(folder))
    assert "n02/2.png" in line


def test_a_picture_that_is_too_small_is_named_with_its_size(folder, tmp_path):
    Image.new("RGB", (20, 60)).save(folder / "n01" / "3.png")
    line = complain(tmp_path, *on_folder(folder))
    for part in ("n01/3.png", "20", "32"):
        assert part in line


def test_pictures_that_are_not_square_are_cropped(folder, tmp_path):
    assert train(tmp_path, *on_folder(folder)).is_dir()


def test_a_label_out_of_range_names_the_valid_ones(tmp_path):
    train(tmp_path, "experiment=sit_s")
    line = complain(tmp_path, "experiment=sit_s", "task=sample", "task.classes=[99]")
    for part in ("task.classes", "99"):
        assert part in line


def test_weights_of_another_architecture(tmp_path):
    last = checkpoints_in(train(tmp_path, "experiment=sit_s"))[-1]
    line = complain(tmp_path, "experiment=sit_s", "task=sample", f"task.checkpoint={last}", "backbone.depth=9")
    assert "another architecture" in line


def test_resuming_with_another_architecture(tmp_path):
    last = checkpoints_in(train(tmp_path / "a", "experiment=sit_s"))[-1]
    line = complain(tmp_path, "experiment=sit_s", f"resume={last}", "steps=4", "backbone.dim=24")
    assert "another architecture" in line


def test_a_checkpoint_callback_that_keeps_nothing_is_refused(tmp_path):
    assert "callbacks.checkpoint.keep" in complain(tmp_path, "experiment=sit_s", "callbacks.checkpoint.keep=0")


def test_latents_without_statistics_are_not_diffused(tmp_path):
    line = complain(tmp_path, "experiment=sit_s", "latent_norm@autoencoder.norm=file")
    for part in ("autoencoder.norm", "SmallKLAutoencoder", "task=precompute", "autoencoder.norm.path="):
        assert part in line
    line = complain(tmp_path, "experiment=sit_s", "latent_norm@autoencoder.norm=file", "autoencoder.norm.path=/no.pt")
    assert "autoencoder.norm.path: no file '/no.pt'" in line


def test_an_autoencoder_under_training_needs_no_statistics(tmp_path):
    train(tmp_path, "experiment=autoencoder_openmoji", "latent_norm@autoencoder.norm=file")


def test_what_an_evaluation_reads_is_missed_before_anything_is_built(tmp_path, monkeypatch):
    """Inception's weights, pictures and reference: said by the check of the composition, which imports no network."""
    monkeypatch.delenv("REPALIGN_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for words, parts in (
        (["metric=inception"], ["metric.network.weights: no Inception weights named", f"'{tmp_path}/hub/checkpoints/"]),
        (["metric=all"], ["metric.spaces.inception.network.weights: no Inception weights named"]),
        (["metric=inception", "metric.network.weights=none.pth"], ["metric.network.weights: no file 'none.pth'"]),
        (["task.samples=none"], ["task.samples: nothing at 'none'"]),
        (["task.reference=none.npz"], ["task.reference: nothing at 'none.npz'", ".safetensors"]),
    ):
        with pytest.raises(UserError) as caught:
            check_composition(compose(["experiment=demo", "task=evaluate", *words]))
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(UserError, match="no Inception weights named"):  # of a training that will score its pictures
        check_composition(compose(["experiment=demo", "callbacks=evaluation", "metric=inception"]))
