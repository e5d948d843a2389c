import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

import tasks.drawing
import tasks.evaluate
import tasks.sample
from callbacks.pictures import class_indices, draw_labels, evaluation_mode, generate
from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.suite import FeatureMetrics
from tasks.pictures_in import count_pictures, read_pictures
from tests.metrics.small import SmallNetwork
from tests.report.tiny import TinyData, TinyGenerator, TinyModule

ROOT = Path(__file__).parents[2]


def tiny_generator():
    return TinyGenerator(nn.Linear(2, 2).eval())


def test_pictures_depend_on_neither_batch_nor_process():
    generator, labels = tiny_generator(), torch.arange(10) % 3
    whole = torch.cat(list(generate(generator, labels, seed=3, batch_size=10)))
    for batch in (1, 4):
        assert torch.equal(torch.cat(list(generate(generator, labels, 3, batch))), whole)
    halves = [list(generate(generator, labels[r.start : r.stop], 3, 2, serials=r)) for r in (range(4), range(4, 10))]
    assert torch.equal(torch.cat(halves[0] + halves[1]), whole)
    assert not torch.equal(torch.cat(list(generate(generator, labels, 4, 10))), whole)


def test_labels():
    data_labels = TinyData().source.labels
    balanced = draw_labels("balanced", 7, 0, [0, 2], data_labels, "k")
    assert balanced.tolist() == [0, 2, 0, 2, 0, 2, 0]
    uniform = draw_labels("uniform", 900, 0, [0, 1, 2], data_labels, "k")
    assert np.bincount(uniform).min() > 250
    frequent = draw_labels("data", 800, 0, [0, 1, 2], data_labels, "k")
    assert np.bincount(frequent, minlength=3) == pytest.approx([600, 0, 200], abs=60)
    with pytest.raises(UserError, match="task.labels: unknown choice 'balance'. Did you mean 'balanced'"):
        draw_labels("balance", 7, 0, [0], data_labels, "task.labels")


def test_classes():
    names = TinyData.class_names
    assert class_indices(["food", 0, "1"], names, "k") == [2, 0, 1]
    with pytest.raises(UserError, match=r"task.classes: no class 3; valid: 0 to 2"):
        class_indices([3], names, "task.classes")
    with pytest.raises(UserError, match="Did you mean 'flags'"):
        class_indices(["flag"], names, "task.classes")


def test_evaluation_mode_gives_every_module_its_own_mode_back():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1][0].eval()
    before = [part.training for part in module.modules()]
    with pytest.raises(ZeroDivisionError), evaluation_mode(module):
        assert not any(part.training for part in module.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [part.training for part in module.modules()] == before and torch.is_grad_enabled()


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """A configuration of a task, around a tiny composition instead of a real one."""
    module, data = TinyModule(tmp_path), TinyData()
    assembly = SimpleNamespace(data=data, module=module)
    monkeypatch.setattr(tasks.sample, "assemble", lambda cfg: assembly)
    monkeypatch.setattr(tasks.sample, "load_weights", lambda module, path: None)
    metrics = FeatureMetrics(SmallNetwork(), {"fd_small": FrechetDistance()})
    monkeypatch.setattr(tasks.evaluate, "build", lambda node, key: {"metric": metrics, "data": data}[key])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000005.ckpt").write_bytes(b"")

    def compose(name, **changes):
        base = {"name": "tiny", "run_dir": str(tmp_path), "seed": 3, "paths": {"cache": str(tmp_path / "cache")}}
        base |= {"metric": {}, "data": {}, "sampler": {"steps": 4}, "guidance": {"scale": 1.5}}
        base["protocol"] = OmegaConf.load(ROOT / "conf" / "protocol" / "default.yaml")
        task = OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml")
        return OmegaConf.merge(base, {"task": task}, {"task": changes})

    return compose


def test_sample_writes_all_three_forms(composed, tmp_path):
    tasks.sample.run(composed("sample", num_samples=7, batch_size=3, write=["grid", "png", "npz"], columns=2))
    folder = tmp_path / "generated"
    with np.load(folder / "samples_7x8x8x3.npz") as file:
        pixels, labels = file["arr_0"], file["arr_1"]
    assert pixels.dtype == np.uint8 and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    files = sorted((folder / "png").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(7)]
    assert all(np.array_equal(np.array(Image.open(f)), p) for f, p in zip(files, pixels, strict=True))
    grid = np.array(Image.open(folder / "grid.png"))
    assert grid.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
    assert np.array_equal(grid[2:10, 2:10], pixels[0]) and np.array_equal(grid[2:10, 12:20], pixels[3])
    assert np.array_equal(grid[12:20, 2:10], pixels[1])
    told = json.loads((folder / "settings.json").read_text())
    assert told["guidance"] == {"scale": 1.5} and told["checkpoint"].endswith("step_00000005.ckpt")


def test_sample_in_parts_fills_one_folder(composed, tmp_path):
    for part in (0, 1):
        tasks.sample.run(composed("sample", num_samples=5, write=["png"], part=part, parts=2, output=f"{tmp_path}/a"))
    tasks.sample.run(composed("sample", num_samples=5, write=["png"], output=f"{tmp_path}/b"))
    for name in (f"{i:06d}.png" for i in range(5)):
        assert (tmp_path / "a/png" / name).read_bytes() == (tmp_path / "b/png" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [7]}, "task.classes: no class 7; valid: 0 to 2"),
        ({"num_samples": 0}, "task.num_samples: found 0, expected 1 or more"),
        ({"part": 2, "parts": 2}, "task.part: found 2, valid: 0 to 1"),
        ({"parts": 2}, r"task.write: found .* writes \[png\] alone"),
        ({"write": ["pgn"]}, "task.write: unknown choice 'pgn'. Did you mean 'png'"),
        ({"rounding": "floor"}, "rounding: unknown choice 'floor'"),
    ],
)
def test_sample_messages(composed, changes, message):
    with pytest.raises(UserError, match=message):
        tasks.sample.run(composed("sample", **changes))


def test_sample_without_checkpoint(composed, tmp_path):
    (tmp_path / "checkpoints" / "step_00000005.ckpt").unlink()
    with pytest.raises(UserError, match="task.checkpoint: none named"):
        tasks.sample.run(composed("sample"))


def test_scores_from_memory_from_folder_and_from_npz_agree(composed, tmp_path):
    drawing = {"num_samples": 12, "labels": "balanced"}
    tasks.evaluate.run(composed("evaluate", **drawing))
    tasks.sample.run(composed("sample", write=["png", "npz"], **drawing))
    folder = tmp_path / "generated"
    tasks.evaluate.run(composed("evaluate", samples=str(folder / "png")))
    found = [json.loads((tmp_path / name).read_text()) for name in ("evaluation.json", "generated/png/evaluation.json")]
    tasks.evaluate.run(composed("evaluate", samples=str(folder / "samples_12x8x8x3.npz"), batch_size=5))
    found.append(json.loads((folder / "evaluation.json").read_text()))
    values = [entry["metrics"]["fd_small"] for entry in found]
    assert values[0] > 0 and values == pytest.approx([values[0]] * 3, rel=1e-6)
    assert all(e["num_samples"] == 12 and e["num_reference"] == 24 for e in found)
    assert all(e["settings"]["sampler"] == {"steps": 4} for e in found)
    assert len({e["protocol_of"]["fd_small"] for e in found}) == 1


def torchrun(world, work):
    """Work in processes that find the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        number = os.fork()
        if not number:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)
            try:
                work()
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(number)
    assert [os.waitstatus_to_exitcode(os.waitpid(n, 0)[1]) for n in children] == [0] * world


def test_processes_that_torchrun_starts_draw_as_one(composed, tmp_path):
    drawing = {"num_samples": 600, "batch_size": 16, "write": ["png", "npz", "grid"]}
    tasks.sample.run(composed("sample", **drawing, keep=f"{tmp_path}/one", output=f"{tmp_path}/a"))
    several = composed("sample", **drawing, keep=f"{tmp_path}/several", output=f"{tmp_path}/b")
    torchrun(3, lambda: tasks.sample.run(several))
    assert sorted(p.name for p in (tmp_path / "b" / "png").iterdir()) == [f"{i:06d}.png" for i in range(600)]
    for file in (p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.p*")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    with np.load(tmp_path / "a/samples_600x8x8x3.npz") as one, np.load(tmp_path / "b/samples_600x8x8x3.npz") as other:
        assert all(np.array_equal(one[name], other[name]) for name in ("arr_0", "arr_1"))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_torchrun_starts_score_as_one(composed, tmp_path, monkeypatch, world):
    one = composed("evaluate", num_samples=600, batch_size=16, keep=str(tmp_path / "one"))
    tasks.evaluate.run(one)
    alone = json.loads((tmp_path / "evaluation.json").read_text())
    several = composed("evaluate", num_samples=600, batch_size=16, keep=str(tmp_path / "several"))
    torchrun(world, lambda: tasks.evaluate.run(several))
    shared = json.loads((tmp_path / "evaluation.json").read_text())
    assert shared["num_samples"] == 600 and shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    assert shared["protocol_of"] == alone["protocol_of"]


def test_an_evaluation_goes_on_where_it_was_killed(composed, tmp_path, monkeypatch):
    """Half of the shards are there: the pictures in them are scored and not drawn again."""
    tasks.evaluate.run(composed("evaluate", num_samples=600, batch_size=16))
    whole = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    (folder,) = [p for p in (tmp_path / "drawn").iterdir() if p.is_dir()]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == 600 and manifest["info"]["settings"]["sampler"] == {"steps": 4}
    (folder / "image.00001.npy").unlink()
    drawn = []
    generate = tasks.drawing.generate
    monkeypatch.setattr(tasks.drawing, "generate", lambda *a: (drawn.append(len(a[1])), generate(*a))[1])
    tasks.evaluate.run(composed("evaluate", num_samples=600, batch_size=16))
    assert drawn == [256]
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == pytest.approx(whole, rel=1e-5)


def test_reference_from_pictures_and_from_nowhere(composed, tmp_path):
    tasks.sample.run(composed("sample", num_samples=12, write=["png", "npz"]))
    png, npz = tmp_path / "generated/png", tmp_path / "generated/samples_12x8x8x3.npz"
    tasks.evaluate.run(composed("evaluate", samples=str(npz), reference=str(png)))
    assert json.loads((npz.parent / "evaluation.json").read_text())["metrics"]["fd_small"] < 1e-5
    with pytest.raises(UserError, match="task.reference: nothing at"):
        tasks.evaluate.run(composed("evaluate", samples=str(npz), reference=str(tmp_path / "none")))


def test_reading_pictures(tmp_path):
    with pytest.raises(UserError, match="task.samples: no folder and no .npz"):
        list(read_pictures(tmp_path / "none", 4, "task.samples"))
    with pytest.raises(UserError, match="task.samples: no folder and no .npz"):
        count_pictures(tmp_path / "none", "task.samples")
    with pytest.raises(UserError, match="task.samples: no picture"):
        list(read_pictures(tmp_path, 4, "task.samples"))
    np.savez(tmp_path / "wrong.npz", np.zeros((2, 3, 8, 8), dtype=np.float32))
    with pytest.raises(UserError, match=r"arr_0 .* is float32 \(2, 3, 8, 8\), expected uint8"):
        list(read_pictures(tmp_path / "wrong.npz", 4, "k"))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="torn.npz' cannot be read"):
        count_pictures(tmp_path / "torn.npz", "k")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "a.png")
    Image.new("L", (8, 8), 51).save(folder / "b.png")
    (images,) = read_pictures(folder, 4, "k")
    assert (
        images.shape == (2, 3, 8, 8)
        and images[0, :, 0, 0].tolist() == [1, 0, 0]
        and images[1].mean() == pytest.approx(0.2)
    )
    Image.new("RGB", (9, 8)).save(folder / "c.png")
    with pytest.raises(UserError, match=r"c.png' is \(8, 9\), the pictures before it \(8, 8\)"):
        list(read_pictures(folder, 4, "k"))
    (folder / "c.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="c.png' cannot be read as a picture"):
        list(read_pictures(folder, 4, "k"))
