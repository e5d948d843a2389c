"""Data that read the list: pictures, captions, buckets and stores without what was removed; runs that are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from datamodules.captioned import CaptionedFolder
from datamodules.curated import read_decisions, write_decisions
from datamodules.image_text import ImageTextDataModule
from repalign.errors import UserError
from tasks.curate_page import curation_page
from tasks.report import render
from tests.curation.made import curated, write_folder
from tests.data.conftest import TinyAutoencoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("kept")
    write_folder(base / "pictures")
    write_decisions(base / "list", curated(base / "pictures", base / "cache"), {})
    return base


def module(made, root="pictures", **options):
    pictures = partial(CaptionedFolder)
    keep, cache = made / "list", made / "cache"
    return ImageTextDataModule(
        pictures=pictures,
        root=made / root,
        image_size=32,
        batch_size=4,
        upscale=True,
        keep=keep,
        cache_root=cache,
        **options,
    )


def test_pictures_captions_and_fingerprint_are_of_the_kept(made):
    data = module(made)
    kept = [one.name for one in read_decisions(made / "list") if one.step is None]
    assert len(kept) == len(data.source) == 20
    assert list(data.captions) == [f"caption of {name}" for name in kept]
    assert [data.source.name(i) for i in range(20)] == kept
    everything = CaptionedFolder(made / "pictures", 32, upscale=True)
    row = everything.files.index(kept[7])
    assert (data.source.load([7])[0] == everything.load([row])[0]).all()
    assert data.fingerprint != everything.fingerprint


@pytest.mark.parametrize("buckets", [False, True])
def test_training_batches_and_stores_are_of_the_kept(made, buckets):
    data = module(made, buckets=buckets, bucket_step=16)
    data.attach_cache(TinyAutoencoder())
    (store,) = data.stores.values()
    assert len(store) == 20
    batch = next(iter(data.train_dataloader()))
    names = {f"caption of {one.name}" for one in read_decisions(made / "list") if one.step is None}
    assert set(batch["caption"]) <= names


def test_a_list_of_other_pictures_is_refused(made, tmp_path):
    other = write_folder(tmp_path / "pictures")
    (other / "new.png").write_bytes((other / "a00.png").read_bytes())
    with open(other / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "new.png", "text": "new"}\n')
    with pytest.raises(UserError, match="does not know 1 of the 29 here, such as new.png"):
        module(made, root=other).source


def test_the_page_shows_steps_groups_and_removed_pictures(made):
    source = CaptionedFolder(made / "pictures", 32, "skip", True)
    decisions = read_decisions(made / "list")
    told = [
        {"name": name, "removed": sum(one.step == name for one in decisions)}
        for name in ("readable", "size", "quality", "near_duplicates")
    ]
    values = curation_page(source, decisions, told, 5)
    page = render("curate.html", values)
    assert [row["left"] for row in values["table"]] == [27, 25, 24, 20] and values["kept"] == 20
    assert len(values["groups"]) == 4 and all(len(group) == 2 for group in values["groups"])
    assert "20 of 28 pictures are kept" in page and ", less than 0.02" in page
    assert page.count("data:image/png;base64,") == 8 + 3 + 10, "a torn picture has none"
    assert "http://" not in page and "https://" not in page and "<script" not in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_moment_the_list_is_the_same(made, tmp_path):
    def start(output):
        words = [str(made / "pictures"), str(tmp_path / "cache"), str(output)]
        return subprocess.Popen([sys.executable, "-m", "tests.curation.made", *words], cwd=ROOT)

    for pieces in (1, 3, 5):
        process = start(tmp_path / "killed")
        deadline = time.monotonic() + 250
        while len(list((tmp_path / "cache").rglob("shard.*.json"))) < pieces and time.monotonic() < deadline:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    assert start(tmp_path / "killed").wait() == 0
    write_decisions(tmp_path / "whole", curated(made / "pictures", tmp_path / "other"), {})
    for name in ("manifest.json", "pictures.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
