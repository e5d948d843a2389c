"""Drawing into shards: kills, several processes, given settings, the files of the ADM suite."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from datamodules.own_store import Share
from repalign.errors import UserError
from tasks.drawing import Drawing, pictures_of
from tasks.pictures_in import count_pictures, fingerprint_of, read_pictures

COUNT, BATCH = 300, 64


def generator(labels, random):
    """Grey by label, texture by the random stream."""
    return (labels[:, None, None, None] / 10 + 0.1 * random.normal("x_1", (3, 4, 4))).clamp(0, 1)


def slow(labels, random):
    time.sleep(0.01)
    return generator(labels, random)


def drawing(root, draw=generator, batch=BATCH, **settings):
    labels = torch.arange(COUNT) % 10
    told = {"seed": 3, "weights": "abc", **settings}
    return Drawing(root, told, labels, draw, 3, batch, "round", torch.device("cpu"))


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def child(work):
    number = os.fork()
    if not number:
        try:
            work()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return number


def status(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def test_killed_five_times_the_pictures_are_the_same(tmp_path):
    whole = drawing(tmp_path / "whole")
    assert whole.draw()
    killed = drawing(tmp_path / "killed", slow, batch=16)  # small batches: 19 moments to die at
    moments, dead = random.Random(0), 0
    for _ in range(5):
        number = child(killed.draw)
        time.sleep(moments.uniform(0.02, 0.12))
        os.kill(number, signal.SIGKILL)
        dead += status(number) == -signal.SIGKILL
    assert dead >= 3
    assert killed.draw()
    again = drawing(tmp_path / "again", batch=16)
    again.draw()
    assert content(killed.folder) == content(again.folder)
    assert np.array_equal(killed.store.whole("image"), whole.store.whole("image"))
    assert killed.store.whole("label").tolist() == [i % 10 for i in range(COUNT)]


def test_finished_shards_are_not_drawn_again(tmp_path):
    seen = []

    def counted(labels, random):
        seen.extend(random.serials)
        return generator(labels, random)

    drawing(tmp_path, counted).draw(Share(0, 2))
    first = len(seen)
    drawing(tmp_path, counted).draw()
    assert first == 256 + 1 and len(seen) - first == COUNT - 256  # one more to learn the size of a picture
    drawing(tmp_path, counted).draw()
    assert len(seen) == COUNT + 1


def test_every_picture_is_taken_once_drawn_now_or_before(tmp_path):
    expected = None
    for _ in range(2):
        taken = {}
        one = drawing(tmp_path)
        one.draw(take=lambda serials, pictures, taken=taken: taken.update(zip(serials.tolist(), pictures, strict=True)))
        assert sorted(taken) == list(range(COUNT))
        rows = torch.stack([taken[i] for i in range(COUNT)])
        expected = rows if expected is None else expected
        assert torch.equal(rows, expected)
    stored = torch.cat([pictures for _, _, pictures in pictures_of(one.store, 50)])
    assert torch.equal(stored, expected)


def test_an_error_of_the_taker_stops_the_drawing(tmp_path):
    def refuse(serials, pictures):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        drawing(tmp_path).draw(take=refuse)


def test_processes_share_the_work(tmp_path):
    drawing(tmp_path / "one").draw()
    two = drawing(tmp_path / "two")
    assert [status(n) for n in [child(lambda i=i: two.draw(Share(i, 2))) for i in range(2)]] == [0, 0]
    assert content(two.folder) == content(drawing(tmp_path / "one").folder)


def test_other_settings_lie_beside(tmp_path):
    one, other = drawing(tmp_path), drawing(tmp_path, seed=4)
    assert one.folder != other.folder and one.folder.parent == other.folder.parent
    assert one.folder == drawing(tmp_path, batch=7).folder  # the batch is no setting


def test_shards_are_read_as_pictures(tmp_path):
    one = drawing(tmp_path)
    one.draw()
    assert count_pictures(one.folder, "k") == COUNT
    images = torch.cat(list(read_pictures(one.folder, 70, "k")))
    assert images.shape == (COUNT, 3, 4, 4)
    assert np.array_equal((images * 255).round().byte().permute(0, 2, 3, 1).numpy(), one.store.whole("image"))
    assert fingerprint_of(one.folder) == fingerprint_of(drawing(tmp_path).folder)
