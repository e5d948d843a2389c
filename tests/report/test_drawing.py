"""Drawing into shards: kills, several processes, given settings, the files of the ADM suite."""

import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.own_store import Share
from repalign.errors import UserError
from repalign.state import Cond
from repalign.training.generate import ImageGenerator
from tasks.drawing import Drawing, pictures_of
from tasks.pictures_in import count_pictures, fingerprint_of, read_pictures

COUNT, BATCH = 300, 64


def generator(labels, random):
    """Grey by label, texture by the random stream."""
    return (labels[:, None, None, None] / 10 + 0.1 * random.normal("x_1", (3, 4, 4))).clamp(0, 1)


def slow(labels, random):
    time.sleep(0.01)
    return generator(labels, random)


def drawing(root, draw=generator, batch=BATCH, overlap=None, **settings):
    labels = torch.arange(COUNT) % 10
    told = {"seed": 3, "weights": "abc", **settings}
    return Drawing(root, told, labels, draw, 3, batch, "round", torch.device("cpu"), overlap)


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


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_of_the_taker_stops_the_drawing(tmp_path, overlap):
    def refuse(serials, pictures):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        drawing(tmp_path, overlap=overlap).draw(take=refuse)


def two_stages():
    """The real generator around parts that are as small as they can be: noise, then colours of it."""
    decoded_in = []

    class Colours:
        def decode(self, raw):
            decoded_in.append((threading.current_thread() is threading.main_thread(), torch.is_grad_enabled()))
            return raw.sigmoid()

    class Labels:
        reads = ("label",)

        def __call__(self, batch):
            return Cond(label=batch["label"])

        def null(self, count, device):
            return Cond(label=torch.zeros(count, dtype=torch.int64))

    def sampler(field, x_1, random):
        return x_1 * 3

    norm = SimpleNamespace(denormalize=lambda latent: latent + 1)
    parts = {"backbone": None, "path": None, "parametrization": None, "guidance": lambda bind, cond, null: None}
    made = ImageGenerator(
        **parts, conditioner=Labels(), sampler=sampler, norm=norm, autoencoder=Colours(), latent_shape=(3, 4, 4)
    )
    return made, decoded_in


def test_decoding_and_scoring_run_beside_the_sampler_where_that_is_asked(tmp_path):
    found, threads = {}, {}
    for overlap in (False, True):
        made, threads[overlap] = two_stages()
        one, taken = drawing(tmp_path / f"{overlap}", made, overlap=overlap), {}
        one.draw(take=lambda serials, pictures, taken=taken: taken.update(zip(serials.tolist(), pictures, strict=True)))
        stored = torch.from_numpy(one.store.whole("image")).permute(0, 3, 1, 2)
        assert torch.equal(torch.stack([taken[i] for i in range(COUNT)]), stored)
        found[overlap] = content(one.folder)
    assert found[False] == found[True]
    assert set(threads[False]) == {(True, False)}  # in the main thread, without gradients
    assert set(threads[True][1:]) == {(False, False)}  # the first picture tells the size, before the drawing
    assert not drawing(tmp_path).overlap  # on a CPU nobody gains by it
    assert Drawing(tmp_path, {}, torch.arange(2), generator, 0, 1, "round", torch.device("cuda")).overlap


def test_a_sampler_that_leaves_the_processor_alone_does_not_wait_for_the_scores(tmp_path):
    """As on an accelerator: the drawing takes as long as the longer of the two, not as their sum."""

    def elsewhere(labels, random):
        time.sleep(0.04)
        return generator(labels, random)

    seconds = {}
    for overlap in (False, True):
        one = drawing(tmp_path / f"{overlap}", elsewhere, batch=8, overlap=overlap)
        began = time.perf_counter()
        one.draw(take=lambda serials, pictures: time.sleep(0.04))
        seconds[overlap] = time.perf_counter() - began
    assert seconds[True] < 0.8 * seconds[False]


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
