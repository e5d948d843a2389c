"""task=probe on tiny twins: its files, its figures, its messages."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from repalign.errors import UserError
from repalign.state import Gaussian
from tasks import probe
from tasks.check import check_composition
from tasks.launch import compose
from tasks.probe_rows import read_rows
from tests.smoke.test_recipes_train import train


def composed(tmp_path, experiment, *words):
    base = [f"experiment={experiment}", "debug=tiny", f"paths.runs={tmp_path}", "run_name=run", "task=probe"]
    cfg = compose([*base, *words])
    check_composition(cfg)
    return cfg


@pytest.mark.parametrize("experiment", ["repa_sit_s", pytest.param("reg_sit_b", marks=pytest.mark.slow)])
def test_every_layer_at_every_time(tmp_path, experiment):
    run_dir = train(tmp_path, f"experiment={experiment}")
    words = ["task.taps=[block.1,block.4]", "task.times=[0.2,0.8]", "task.shown=2", "task.neighbors=4"]
    probe.run(composed(tmp_path, experiment, *words))
    folder = run_dir / "probe"
    rows = read_rows(folder / "probe.csv")
    measures = {"accuracy", "cknna/main", "cka/main"}
    assert {(r.tap, r.t, r.measure) for r in rows} == {
        (tap, t, m) for tap in ("block.1", "block.4") for t in (0.2, 0.8) for m in measures
    }
    assert all(0 <= r.value <= 1 for r in rows if r.measure != "cknna/main")
    for name in ("accuracy", "cknna_main", "cka_main", "components_t0.2", "components_t0.8"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 30, name
    told = json.loads((folder / "probe.json").read_text())
    assert told["pictures"] == 64 and set(told["best"]) == measures and told["settings"]["weights"]
    if experiment == "reg_sit_b":
        before = (folder / "probe.csv").read_bytes()
        torch.manual_seed(5)
        probe.run(composed(tmp_path, experiment, *words))
        assert (folder / "probe.csv").read_bytes() == before
    with pytest.raises(UserError, match="task.taps: unknown tap of this backbone 'blok.1'. Did you mean 'block.1'"):
        probe.run(composed(tmp_path, experiment, "task.taps=[blok.1]"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.times=[1.5]"], r"task.times: expected times in \[0, 1\], found 1.5"),
        (["task.head=linea"], "task.head: unknown choice 'linea'. Did you mean 'linear'"),
        (["task.test_share=1.0"], "task.test_share: expected a share between 0 and 1"),
    ],
)
def test_messages(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        probe.run(composed(tmp_path, "sit_s", *words))


def test_latents_are_normalised_as_the_probed_weights_know_them():
    """REPA-E keeps averaged statistics beside the averaged weights, and live ones in the autoencoder."""

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def normalize(self, raw):
            return raw * self.factor

    class Plain:
        norm = Scale(5.0)

        def encode(self, images):
            return Gaussian(images, None)

    pictures = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = SimpleNamespace(
        setup=lambda stage: None, images=lambda part: pictures[part], source=SimpleNamespace(labels=np.arange(6))
    )
    averaged = SimpleNamespace(autoencoder=Plain(), norm=Scale(2.0))
    material = probe.gather(data, averaged, {}, {}, [3, 1, 5], 2, seed=0)
    torch.testing.assert_close(material.x_0.cpu(), 2.0 * pictures[[3, 1, 5]].float() / 255)
    assert material.labels.tolist() == [3, 1, 5]
