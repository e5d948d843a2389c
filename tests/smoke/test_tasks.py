"""Tasks after a training, and the options of a training, on tiny twins."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks.checkpoint import checkpoints_in
from repalign.errors import UserError
from repalign.seals import seal_of
from tasks import convert, precompute, reconstruct, train
from tasks.build import assemble, load_weights
from tasks.check import check_composition
from tasks.launch import compose
from tests.data.test_precompute import content
from tests.smoke.test_recipes_train import column
from tests.smoke.test_recipes_train import train as train_tiny


def convert_file(tmp_path: Path, *words: str, experiment: str = "repa_sit_s") -> None:
    cfg = compose([f"experiment={experiment}", "debug=tiny", f"paths.runs={tmp_path}", "task=convert", *words])
    check_composition(cfg)
    convert.run(cfg)


def weights_of(tmp_path: Path, file: Path, experiment: str = "repa_sit_s") -> dict[str, torch.Tensor]:
    module = assemble(compose([f"experiment={experiment}", "debug=tiny", f"paths.runs={tmp_path}"])).module
    load_weights(module, file)
    return dict(module.ema.module.state_dict())


@pytest.mark.parametrize(
    ("experiment", "family", "container", "key"),
    [
        ("repa_sit_s", "repa", "ema", "projectors.0.0.weight"),
        ("ddt_b", "ddt", "state_dict", "diffusion_trainer.proj.0.0.weight"),
    ],
)
def test_weights_survive_the_way_to_the_official_format_and_back(experiment, family, container, key, tmp_path):
    trained = checkpoints_in(train_tiny(tmp_path, f"experiment={experiment}"))[-1]
    official, back = tmp_path / "official.pt", tmp_path / "back.safetensors"
    words = ["task.direction=export", f"task.family={family}", f"task.input={trained}", f"task.output={official}"]
    convert_file(tmp_path, *words, experiment=experiment)
    assert key in torch.load(official, weights_only=True)[container]
    words = [f"task.family={family}", f"task.input={official}", f"task.output={back}"]
    convert_file(tmp_path, *words, experiment=experiment)
    before, after = (weights_of(tmp_path, file, experiment) for file in (trained, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_reconstruct_scores_an_autoencoder_and_draws_it(tmp_path):
    words = ["task=reconstruct", "debug=tiny", "run_name=run", "task.num_samples=20", "task.columns=4", "task.rows=1"]
    cfg = compose([*words, f"paths.runs={tmp_path}", f"paths.cache={tmp_path}/cache"])
    check_composition(cfg)
    reconstruct.run(cfg)
    written = json.loads((Path(cfg.run_dir) / "reconstruction.json").read_text())
    assert {"l1", "psnr", "ssim", "fd_lite0"} <= written["metrics"].keys() and written["num_samples"] == 20
    with Image.open(Path(cfg.run_dir) / "reconstruction.png") as grid:
        assert grid.size == (4 * 34 + 2, 2 * 34 + 2)
    with pytest.raises(UserError, match="autoencoder: Pixels restores pictures as they are"):
        reconstruct.run(compose([*words, "autoencoder=pixels", f"paths.runs={tmp_path}"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.family=repaa"], "task.family: unknown family of checkpoints 'repaa'. Did you mean 'repa'"),
        (["task.family=repa", "task.input=/no/file.pt"], "task.input: no file '/no/file.pt'"),
    ],
)
def test_convert_says_what_is_wrong(words, message, tmp_path):
    given = tmp_path / "given.pt"
    torch.save({"ema": {}}, given)
    with pytest.raises(UserError, match=message):
        convert_file(tmp_path, f"task.input={given}", f"task.output={tmp_path / 'out.safetensors'}", *words)


def test_a_file_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read safely"):
        convert.read_official(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_of_another_architecture_name_the_first_difference(suffix, tmp_path):
    file = checkpoints_in(train_tiny(tmp_path, "experiment=repa_sit_s"))[-1]
    if suffix == "safetensors":
        official = tmp_path / "official.pt"
        export = ["task.direction=export", f"task.input={file}", f"task.output={official}"]
        convert_file(tmp_path, "task.family=repa", *export)
        file = tmp_path / "ours.safetensors"
        convert_file(tmp_path, "task.family=repa", f"task.input={official}", f"task.output={file}")
    module = assemble(
        compose(["experiment=repa_sit_s", "debug=tiny", f"paths.runs={tmp_path}", "backbone.dim=24"])
    ).module
    with pytest.raises(UserError, match="another architecture.*16.*24"):
        load_weights(module, file)


def test_torn_checkpoints_are_named(tmp_path):
    last = checkpoints_in(train_tiny(tmp_path, "experiment=sit_s"))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    module = assemble(compose(["experiment=sit_s", "debug=tiny", f"paths.runs={tmp_path}"])).module
    with pytest.raises(UserError, match=f"'{last}' is damaged"):
        load_weights(module, last)
    seal_of(last).unlink()  # from elsewhere, without its seal
    with pytest.raises(UserError, match=f"'{last}' cannot be read"):
        load_weights(module, last)


def test_the_same_run_name_continues_and_never_refuses(tmp_path):
    words = ["experiment=sit_s", "callbacks.checkpoint.every=1"]
    run_dir = train_tiny(tmp_path, *words)
    assert train_tiny(tmp_path, *words, "steps=4") == run_dir
    assert len(column(run_dir, "train/loss")) == 4
    with pytest.raises(UserError, match="resume: 'never'"):
        train_tiny(tmp_path, *words, "resume=never")


def test_wandb_runs_offline_and_keeps_its_id(tmp_path):
    run_dir = train_tiny(tmp_path, "experiment=sit_s", "logger=wandb")
    train_tiny(tmp_path, "experiment=sit_s", "logger=wandb", "steps=3")
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1


@pytest.mark.parametrize("words", [["trainer.precision=bf16-mixed"], ["data.horizontal_flip=true"]])
def test_options_of_a_training(words, tmp_path):
    assert math.isfinite(column(train_tiny(tmp_path, "experiment=repa_sit_s", *words), "train/loss")[-1])


@pytest.mark.slow
def test_compiled_training_has_the_same_losses(tmp_path):
    eager = train_tiny(tmp_path / "a", "experiment=repa_sit_s")
    compiled = train_tiny(tmp_path / "b", "experiment=repa_sit_s", "compile=network")
    losses = [torch.tensor(column(run_dir, "train/loss")) for run_dir in (eager, compiled)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_initial_weights_do_not_depend_on_the_aligner(tmp_path):
    with_repa = assemble(compose(["experiment=demo", "debug=tiny", "align.tap=block.2"])).module
    without = assemble(compose(["experiment=demo", "debug=tiny", "aligner=none"])).module
    for name, value in without.trained["backbone"].state_dict().items():
        assert torch.equal(value, with_repa.trained["backbone"].state_dict()[name]), name


def test_the_first_checkpoint_is_found_again_by_name(tmp_path):
    run_dir = train_tiny(tmp_path, "experiment=sit_s")
    assert train.find_checkpoint("auto", run_dir) == checkpoints_in(run_dir)[-1]
    with pytest.raises(UserError, match="resume: no checkpoint 'x.ckpt'"):
        train.find_checkpoint("x.ckpt", run_dir)


def precompute_tiny(tmp_path: Path, *words: str) -> None:
    cfg = compose(["experiment=repa_sit_s", "debug=tiny", "task=precompute", f"paths.cache={tmp_path}", *words])
    check_composition(cfg)
    precompute.run(cfg)


def test_precompute_says_how_to_use_its_statistics(tmp_path, capsys):
    precompute_tiny(tmp_path / "cache", "task.shard_mib=0.01", "data.latent_dtype=float16")
    said = capsys.readouterr().out
    assert "latents: " in said and "(64 rows)" in said and "features_main: " in said
    (line,) = [line for line in said.splitlines() if "to normalise with them: " in line]
    words = shlex.split(line.partition("them: ")[2])
    norm = assemble(compose(["experiment=repa_sit_s", "debug=tiny", *words])).autoencoder.norm
    mean = [float(x) for x in said.partition("latent mean [")[2].partition("]")[0].split(",")]
    torch.testing.assert_close(norm.bias.flatten(), torch.tensor(mean), atol=1e-4, rtol=0)
    train_tiny(
        tmp_path, "experiment=repa_sit_s", f"paths.cache={tmp_path / 'cache'}", "data.latent_dtype=float16", *words
    )


def test_precompute_into_a_folder_of_ones_own_refuses_other_weights(tmp_path):
    mine = f"task.output={tmp_path / 'mine'}"
    precompute_tiny(tmp_path, mine)
    root = f"data.root={tmp_path / 'mine'}"
    run_dir = train_tiny(tmp_path, "experiment=repa_sit_s", "data=latents", root, "~data.size")
    assert math.isfinite(column(run_dir, "train/loss")[-1])
    with pytest.raises(UserError, match=r"mine/latents' holds .*fingerprint: found '\w+', expected '\w+'"):
        precompute_tiny(tmp_path, mine, "autoencoder.width=32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.part=2", "task.parts=2"], "task.part: found 2, valid: 0 to 1"),
        (["task.processes=0"], "task.processes: expected 1 or more"),
    ],
)
def test_precompute_says_what_is_wrong(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        precompute_tiny(tmp_path, *words)


def test_parts_of_several_machines(tmp_path, capsys):
    precompute_tiny(tmp_path / "whole", "task.shard_mib=0.01")
    for part in range(3):
        assert "are done" not in capsys.readouterr().out
        precompute_tiny(tmp_path / "parts", "task.shard_mib=0.01", f"task.part={part}", "task.parts=3")
        assert ("is done; the last part to end" in capsys.readouterr().out) == (part < 2)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


@pytest.mark.slow
def test_precompute_in_two_processes_killed_and_continued(tmp_path):
    """The starting process is killed: its children end with it, and the next run completes their work."""
    words = ["experiment=repa_sit_s", "debug=tiny", "task=precompute", "task.shard_mib=0.004", "data.size=256"]
    command = [
        sys.executable,
        "run.py",
        *words,
        "task.batch_size=1",
        f"paths.cache={tmp_path / 'two'}",
        "task.processes=2",
    ]
    started = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not list((tmp_path / "two").rglob("shard.0000*.json")):
        time.sleep(0.01)
        assert started.poll() is None
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    time.sleep(1)
    done = len(list((tmp_path / "two").rglob("shard.*.json")))
    time.sleep(1)
    assert len(list((tmp_path / "two").rglob("shard.*.json"))) == done > 0
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0
    precompute_tiny(tmp_path / "one", *words[3:], "task.batch_size=1")
    assert content(tmp_path / "two") == content(tmp_path / "one")
