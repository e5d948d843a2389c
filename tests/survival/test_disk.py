"""Full and broken disks, torn and flipped checkpoints: the one before always loads, and nothing is lost in silence."""

import builtins
import errno
import hashlib
import random
import shutil

import pytest
import torch

from callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint, checkpoints_in
from repalign import seals
from repalign.errors import UserError
from repalign.seals import Damaged, require_whole, seal_of, write_sealed
from tasks.launch import compose
from tasks.train import newest_whole, run


def state(step, size=20_000):
    """A checkpoint whose numbers all say its step."""
    return {"progress": {"step": step}, "state_dict": {"weight": torch.full((size,), float(step))}}


def save(folder, step, io=None):
    path = folder / "checkpoints" / f"step_{step:08d}.ckpt"
    (io or AtomicCheckpointIO()).save_checkpoint(state(step), path)
    return path


class Faulty:
    """A file that fails once so many bytes are through, or at its flush to the disk."""

    def __init__(self, file, at, error):
        self.file, self.left, self.error = file, at, error

    def write(self, data):
        data = memoryview(bytes(data))
        if len(data) > self.left:
            self.file.write(data[: self.left])
            raise OSError(self.error, "injected")
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def break_disk(monkeypatch, at, error=errno.ENOSPC):
    monkeypatch.setattr(
        seals,
        "open",
        lambda *a: Faulty(builtins.open(*a), at, error) if "wb" in a else builtins.open(*a),
        raising=False,
    )


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_of_thirty_offsets_leaves_the_one_before(monkeypatch, tmp_path, error):
    good = save(tmp_path, 1)
    size = good.stat().st_size
    for offset in [0, 1, *sorted(random.Random(error).sample(range(2, size), 26)), size - 1, size]:
        with monkeypatch.context() as broken:
            break_disk(broken, offset, error)
            io = AtomicCheckpointIO()
            save(tmp_path, 2, io)
            assert (io.failure is None) == (offset == size)
        # With room for the whole file there is room for its seal as well.
        step = 2 if offset == size else 1
        assert AtomicCheckpointIO().load_checkpoint(newest_whole(tmp_path))["progress"]["step"] == step
        assert (newest_whole(tmp_path) == good) == (step == 1)
        assert not list(tmp_path.rglob(".*.incomplete"))


def test_errors_of_flush_and_rename_and_of_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    good = save(tmp_path, 1)

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    for place in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(seals.os, place, refuse)
            io = AtomicCheckpointIO()
            save(tmp_path, 2, io)
            assert "Read-only file system" in io.failure
        assert newest_whole(tmp_path) == good
    (tmp_path / "taken").write_text("a file where the folder should be")
    io = AtomicCheckpointIO()
    save(tmp_path / "taken", 2, io)
    assert io.failure


@pytest.mark.parametrize("policy", ["go_on", "stop"])
def test_training_goes_on_or_stops_by_policy_when_the_disk_is_full(monkeypatch, tmp_path, capsys, policy):
    words = ["experiment=sit_s", "debug=tiny", "run_name=run", "steps=6", "~callbacks.sample_grid", "logger=csv"]
    words += ["callbacks.checkpoint.every=2", f"callbacks.checkpoint.on_failure={policy}", f"paths.runs={tmp_path}"]
    honest, saves = AtomicCheckpointIO._write, []

    def full(self, checkpoint, path):
        saves.append(path)
        with monkeypatch.context() as broken:
            if len(saves) == 2:
                break_disk(broken, 1000)
            honest(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "_write", full)
    run_dir = tmp_path / "sit_s" / "run"
    if policy == "stop":
        with pytest.raises(UserError, match=r"step_00000004.ckpt' could not be written .*the one before is untouched"):
            run(compose(words))
        assert [p.name for p in checkpoints_in(run_dir)] == ["step_00000002.ckpt"]
    else:
        run(compose(words))
        assert "the training goes on" in capsys.readouterr().out
        assert [p.name for p in checkpoints_in(run_dir)] == ["step_00000002.ckpt", "step_00000006.ckpt"]


def test_two_hundred_torn_and_flipped_checkpoints_are_all_noticed(tmp_path, capsys):
    good, newest = save(tmp_path, 1), save(tmp_path, 2)
    whole, rng = newest.read_bytes(), random.Random(0)
    assert hashlib.sha256(whole).hexdigest() in seal_of(newest).read_text()
    for attempt in range(200):
        place = rng.randrange(len(whole))
        if attempt % 2:
            newest.write_bytes(whole[:place])
        else:
            newest.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(Damaged, match="is damaged"):
            require_whole(newest)
        assert newest_whole(tmp_path) == good
    assert capsys.readouterr().out.count("trying the one before") == 200
    newest.write_bytes(whole)
    assert newest_whole(tmp_path) == newest
    good.write_bytes(b"")
    newest.write_bytes(b"")
    with pytest.raises(UserError, match="all 2 checkpoints in .* are damaged"):
        newest_whole(tmp_path)


def test_a_copied_checkpoint_without_its_seal_is_taken_as_it_is(tmp_path):
    newest = save(tmp_path, 2)
    copy = tmp_path / "other" / "checkpoints" / newest.name
    copy.parent.mkdir(parents=True)
    shutil.copy(newest, copy)
    assert newest_whole(tmp_path / "other") == copy


def test_a_background_save_is_of_its_own_step(tmp_path):
    """A hundred saves while the tensors go on moving in place: every file holds the step of its request."""
    io = AtomicCheckpointIO()
    io.background = True
    moving = {"progress": {"step": 0}, "state_dict": {"weight": torch.zeros(200_000)}}
    for step in range(1, 101):
        moving["progress"]["step"] = step
        moving["state_dict"]["weight"].fill_(step)
        io.save_checkpoint(moving, tmp_path / f"{step}.ckpt")
        moving["progress"]["step"] = -1
        moving["state_dict"]["weight"].fill_(-1)
    io.teardown()
    for step in range(1, 101):
        require_whole(tmp_path / f"{step}.ckpt")
        held = io.load_checkpoint(tmp_path / f"{step}.ckpt")
        assert held["progress"]["step"] == step and (held["state_dict"]["weight"] == step).all()


def test_a_failed_background_save_is_known(monkeypatch, tmp_path):
    io = AtomicCheckpointIO()
    io.background = True
    break_disk(monkeypatch, 10)
    save(tmp_path, 1, io)
    io.wait()
    assert "could not be written" in io.failure


def test_the_name_of_the_policy_is_checked():
    with pytest.raises(UserError, match="Did you mean 'go_on'"):
        RunCheckpoint(on_failure="goon")


def test_only_whole_files_are_written(tmp_path):
    target = tmp_path / "x"
    write_sealed(target, lambda file: file.write(b"one"))

    def dies(file):
        file.write(b"tw")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write_sealed(target, dies)
    assert target.read_bytes() == b"one"
    require_whole(target)
