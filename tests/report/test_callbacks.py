import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.evaluate import Evaluate
from callbacks.pictures import draw_labels, generate
from callbacks.sample_grid import SampleGrid
from callbacks.score_log import read_scores
from callbacks.tidy_csv import TidyCSVLogger
from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.kid import KernelDistance
from repalign.metrics.suite import FeatureMetrics
from tasks.report_data import read_series
from tests.metrics.small import SmallNetwork
from tests.report.tiny import TinyData, TinyModule, trainer_with


def fit(folder, callbacks, steps=5, done=0, loggers=(), accumulate=1):
    torch.manual_seed(0)
    module, data = TinyModule(folder, done), TinyData()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode.*")
        trainer_with(callbacks, folder, steps, loggers, accumulate).fit(module, datamodule=data)
    return module, data


def evaluate(folder, **changes):
    scores = {"fd_small": FrechetDistance(), "kid_small": KernelDistance(4, 8)}
    options = {"every": 2, "num_samples": 12, "cache": str(folder / "cache"), "batch_size": 5} | changes
    return Evaluate(metrics=FeatureMetrics(SmallNetwork(), scores), **options)


def test_grids_before_between_and_after(tmp_path):
    fit(tmp_path, [SampleGrid(every=2, columns=4, batch_size=5)])
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == [f"step_{step:06d}_{kind}.png" for step in (0, 2, 4, 5) for kind in ("ema", "raw")]
    grids = {name: Image.open(tmp_path / "samples" / name) for name in names}
    assert grids[names[0]].size == (4 * 10 + 2, 3 * 10 + 2)
    pixels = {name: grid.tobytes() for name, grid in grids.items()}
    assert pixels["step_000000_ema.png"] == pixels["step_000005_ema.png"]  # its weights do not move here
    assert pixels["step_000000_raw.png"] != pixels["step_000005_raw.png"]


def test_a_resumed_run_does_not_draw_its_start_again(tmp_path):
    fit(tmp_path, [SampleGrid(every=100), evaluate(tmp_path, every=100)], steps=3, done=7)
    assert sorted(p.name for p in (tmp_path / "samples").glob("*ema*")) == ["step_000010_ema.png"]


def test_accumulation_draws_once_a_step(tmp_path, monkeypatch):
    drawn = []
    draw = SampleGrid._draw
    monkeypatch.setattr(SampleGrid, "_draw", lambda *a: (drawn.append(a[2].progress.step), draw(*a)))
    callback = SampleGrid(every=1, columns=1)
    fit(tmp_path, [callback], steps=3, accumulate=4)
    assert drawn == [0, 1, 2, 3]


def test_scores_are_logged_and_said(tmp_path, capsys):
    _, data = fit(tmp_path, [evaluate(tmp_path)], loggers=[TidyCSVLogger(str(tmp_path))])
    series = read_series((tmp_path / "metrics.csv").read_text())
    assert series["eval/fd_small"].steps.tolist() == [0, 2, 4, 5] and (series["eval/fd_small"].values > 0).all()
    assert {"eval/kid_small", "eval/kid_small_std"} <= series.keys()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4 and "fd_small" in lines[0] and "12 pictures" in lines[0] and "_std" not in lines[0]
    assert data.read == 1


def test_batch_size_does_not_change_scores(tmp_path):
    values = []
    for batch in (1, 5, 50):
        folder = tmp_path / str(batch)
        fit(folder, [evaluate(tmp_path, every=100, batch_size=batch)], 1, loggers=[TidyCSVLogger(str(folder))])
        values.append(read_series((folder / "metrics.csv").read_text())["eval/fd_small"].values[0])
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_training_is_the_same_with_and_without_pictures(tmp_path):
    alone, _ = fit(tmp_path / "a", [])
    watched, _ = fit(tmp_path / "b", [SampleGrid(every=1), evaluate(tmp_path / "b", every=1)])
    assert alone.drawn == watched.drawn
    assert torch.equal(alone.live.weight, watched.live.weight)


def test_pictures_reach_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    seen = []
    logger.experiment.add_image = lambda tag, image, step: seen.append((tag, tuple(image.shape), step))
    fit(tmp_path, [SampleGrid(every=100, classes=["food"], columns=2)], 1, loggers=[logger])
    assert seen == [(f"grids/{kind}", (3, 12, 22), step) for step in (0, 1) for kind in ("raw", "ema")]


def test_unknown_class_is_one_line(tmp_path):
    with pytest.raises(UserError, match="callbacks.sample_grid.classes: unknown class 'fod'. Did you mean 'food'"):
        fit(tmp_path, [SampleGrid(every=1, classes=["fod"])])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_score_as_one(tmp_path, world):
    """Every rank scores what it draws; rank 0 writes the numbers that one process writes."""

    def work(rank):
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=world)
        module = TinyModule(tmp_path)
        module.eval()
        data = TinyData()
        trainer = SimpleNamespace(
            global_rank=rank, world_size=world, is_global_zero=rank == 0, datamodule=data, loggers=[], callbacks=[]
        )
        callback = evaluate(tmp_path, num_samples=23)
        callback._evaluate(trainer, module)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()

    children = []
    for rank in range(world):
        number = os.fork()
        if not number:
            try:
                work(rank)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(number)
    assert [os.waitstatus_to_exitcode(os.waitpid(n, 0)[1]) for n in children] == [0] * world
    found = read_scores(tmp_path / "metrics.jsonl")
    assert [line["name"] for line in found] == ["fd_small", "kid_small"] and found[0]["step"] == 0
    work_alone = evaluate(tmp_path, num_samples=23)
    work_alone.metrics.prepare(lambda: TinyData().reference_images(5), "tiny", tmp_path / "cache" / "reference")
    generator = TinyModule(tmp_path).generator()
    labels = draw_labels("data", 23, 0, range(3), TinyData().source.labels, "k")
    for images in generate(generator, labels, 0, 23):
        work_alone.metrics.update(images)
    expected = work_alone.metrics.compute()
    assert {line["name"]: line["value"] for line in found} == pytest.approx(
        {name: expected[name] for name in ("fd_small", "kid_small")}, rel=1e-5
    )
    assert found[0]["record"]["num_samples"] == 23 and found[0]["record"]["labels"] == "data"
