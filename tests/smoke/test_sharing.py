"""DDT on tiny twins: its contract, measuring and sharing the encoder, the sweep of its ratio."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from repalign.errors import UserError
from repalign.samplers.similarity import choose_steps, read_similarity
from tasks import sample, sharing
from tasks.build import assemble
from tasks.check import check_composition
from tasks.launch import CONF, compose
from tests.smoke.test_recipes_train import train


def composed(tmp_path: Path, *words: str):
    cfg = compose(["experiment=ddt_b", "debug=tiny", f"paths.runs={tmp_path}", "run_name=run", *words])
    check_composition(cfg)
    return cfg


def test_similarity_is_measured_drawn_and_used(tmp_path):
    run_dir = train(tmp_path, "experiment=ddt_b")
    words = ["task=sharing", "guidance=ddt", "sampler.steps=6", "task.num_samples=3", "task.rates=[2,3]"]
    sharing.run(composed(tmp_path, *words))
    file = run_dir / "sharing" / "similarity.safetensors"
    similarity = read_similarity(file)
    assert similarity.shape == (6, 6)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6))
    assert len(choose_steps(similarity, 2)) == 3
    with Image.open(run_dir / "sharing" / "similarity.png") as picture:
        assert min(picture.size) > 300
    words = ["task=sample", "task.num_samples=4", "task.write=[npz]", "guidance=ddt", "sampler.steps=6"]
    shared = ["sampler=ddt_shared_statistical", f"sampler.schedule.similarity={file}", "sampler.schedule.rate=2"]
    sample.run(composed(tmp_path, *words, *shared))
    assert list((run_dir / "generated").glob("samples_4x*.npz"))


def test_a_rate_above_the_number_of_steps_names_its_key(tmp_path):
    train(tmp_path, "experiment=ddt_b")
    with pytest.raises(UserError, match=r"task\.rates: expected 1 to 4, the sampler's evaluations; found 8"):
        sharing.run(composed(tmp_path, "task=sharing", "task.num_samples=1"))


def test_a_sampler_that_shares_already_is_not_measured(tmp_path):
    train(tmp_path, "experiment=ddt_b")
    with pytest.raises(UserError, match="measured without sharing"):
        sharing.run(composed(tmp_path, "task=sharing", "sampler=ddt_shared"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backbone=improved_dit_b", "align.tap=block.4"], "DDT: needs a backbone with a carry"),
        (["aligner=none"], "DDT: needs an aligner with an encoder target"),
    ],
)
def test_the_contract(words, says, tmp_path):
    with pytest.raises(UserError, match=says):
        assemble(composed(tmp_path, *words))


@pytest.mark.parametrize("words", [["backbone=improved_dit_b", "align.tap=block.4", "method=repa"]])
def test_the_undivided_baseline_trains(words, tmp_path):
    assert (train(tmp_path, "experiment=ddt_b", *words) / "metrics.csv").is_file()


@pytest.mark.parametrize("sweep", sorted(p.stem for p in (CONF / "sweep").glob("ddt_ratio_*.yaml")))
def test_every_ratio_of_the_sweep_composes(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))
    lines = (CONF / "sweep" / f"{sweep}.yaml").read_text().splitlines()
    (line,) = [line for line in lines if "encoder_depth:" in line]
    ratios = line.partition(":")[2].strip().split(",")
    assert len(ratios) == 4
    for depth in ratios:
        words = [f"experiment=ddt_{sweep[-1]}", f"sweep={sweep}", f"backbone.encoder_depth={depth}"]
        check_composition(compose(words))
