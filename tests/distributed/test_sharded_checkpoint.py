"""A checkpoint in shards: whole or not there, of one step alone, and read by whoever reads ordinary ones."""

import os
import signal

import pytest
import torch

from callbacks.checkpoint import checkpoints_in, progress_of, read_checkpoint, step_of
from repalign.seals import Damaged, require_whole
from tasks.build import assemble, load_weights
from tasks.launch import compose
from tests.distributed.runs import COMMON, FSDP, job, trained

pytestmark = pytest.mark.timeout(1800)  # several trainings of several processes, perhaps on few cores

WORDS = ("data.batch_size=12", "callbacks.checkpoint.keep=-1", "callbacks.checkpoint.every=1")


@pytest.mark.slow
def test_a_write_behind_is_of_its_step_and_a_killed_one_leaves_the_last(tmp_path):
    """Training goes on while step n is written: what is written must not move with it."""
    whole, torn, resumed = trained(
        job(tmp_path / "a", "repa_sit_s", 2, *FSDP, *WORDS, "trainer.strategy.write_behind=false", "steps=8"),
        job(tmp_path / "b", "repa_sit_s", 2, *FSDP, *WORDS, "steps=8", kill="write:5"),
        job(tmp_path / "b", "repa_sit_s", 2, *FSDP, *WORDS, "steps=8"),
    )
    assert torn.statuses == [-signal.SIGKILL] * 2
    found = checkpoints_in(resumed.folder)
    assert [step_of(path) for path in found] == list(range(1, 9))
    for one, other in zip(checkpoints_in(whole.folder), found, strict=True):
        ours, theirs = read_checkpoint(one), read_checkpoint(other)
        assert ours["progress"]["step"] == theirs["progress"]["step"] == progress_of(other) == step_of(other)
        assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
    assert not [name for name in os.listdir(found[0].parent) if name.startswith(".")]


@pytest.mark.slow
def test_shards_are_safetensors_and_weights_are_loaded_from_them(tmp_path):
    (run,) = trained(job(tmp_path, "repa_sit_s", 2, *FSDP, *WORDS, "steps=2"))
    folder = checkpoints_in(run.folder)[-1]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".pt", ".sha256"}
    assert not (folder / ".metadata").exists()  # the pickled index that torch's own storage keeps
    module = assemble(compose([*COMMON, "experiment=repa_sit_s", *WORDS])).module
    load_weights(module, folder)
    state = run.checkpoint["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())

    require_whole(folder)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match=shard.name):
        require_whole(folder)
    shard.unlink()
    with pytest.raises(Damaged, match=shard.name):
        require_whole(folder)


@pytest.mark.slow
def test_a_write_that_fails_ends_the_run_with_an_error(tmp_path):
    (run,) = trained(job(tmp_path, "repa_sit_s", 2, *FSDP, *WORDS, "steps=4", kill="fail:2"), fails=True)
    assert run.statuses == [1, 1]
    assert [step_of(path) for path in checkpoints_in(run.folder)] == [1]
