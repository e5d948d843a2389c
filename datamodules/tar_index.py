"""Where the members of tar shards lie: found once per shard and kept, so that samples can be read in any order."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.cache import short
from datamodules.files import lock_path, locked
from datamodules.progress import progress
from repalign.errors import UserError
from repalign.folders import write_atomically

PICTURES = ("jpg", "jpeg", "png", "webp")
MOST_NOTE = 1 << 24  # bytes of a label or a JSON member, which are read whole
VERSION = 2  # of the index files


@dataclass(frozen=True)
class TarIndex:
    """Samples of several shards, in the order of shards and members.

    Attributes:
        shard: number of the shard, int64 [N].
        picture: offset and size of the encoded picture in the shard, int64 [N, 2].
        text: offset and size of the caption's member, size -1 where there is none, int64 [N, 2].
        json: offset and size of the sample's JSON member, size -1 where there is none, int64 [N, 2].
        is_json: whether that member is a JSON object with a key 'caption', bool [N].
        label: -1 where there is none, int64 [N].
        without_picture: samples that were left out.
    """

    shard: np.ndarray
    picture: np.ndarray
    text: np.ndarray
    json: np.ndarray
    is_json: np.ndarray
    label: np.ndarray
    without_picture: int


def index_of(shards: Sequence[Path], cache_root: Path) -> TarIndex:
    """The index of all shards; what is not in the cache yet is found by reading the headers of every member.

    The members of a sample follow each other and have the same name up to the first dot (the convention of the library
    webdataset): ``KEY.jpg`` or .jpeg, .png, .webp; ``KEY.cls``, a decimal label; ``KEY.txt``, a caption;
    ``KEY.json``, an object whose 'label' and 'caption' are taken where the former are missing.

    Raises:
        UserError: for a shard that is torn, compressed or no tar, and for a label that is no number.
    """
    folder = cache_root / "tar-index"
    found = [_kept(folder, path) for path in shards]
    if missing := [number for number, part in enumerate(found) if part is None]:
        with (
            locked(lock_path(folder)),
            progress("indexing tar shards", len(shards), len(shards) - len(missing)) as advance,
        ):
            folder.mkdir(parents=True, exist_ok=True)
            for number in missing:
                # Another process may have done it while this one waited.
                found[number] = _kept(folder, shards[number]) or _index(folder, shards[number])
                advance(1)
    parts = [part for part in found if part is not None]
    counts = [len(part["label"]) for part in parts]
    return TarIndex(
        shard=np.repeat(np.arange(len(parts)), counts),
        picture=np.concatenate([part["picture"] for part in parts]),
        text=np.concatenate([part["text"] for part in parts]),
        json=np.concatenate([part["json"] for part in parts]),
        is_json=np.concatenate([part["is_json"] for part in parts]),
        label=np.concatenate([part["label"] for part in parts]),
        without_picture=sum(int(part["without_picture"]) for part in parts),
    )


def _file_of(folder: Path, shard: Path) -> Path:
    status = shard.stat()
    identity = f"{VERSION} {shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    return folder / f"{shard.stem}-{short(identity)}.npz"


def _kept(folder: Path, shard: Path) -> dict[str, np.ndarray] | None:
    file = _file_of(folder, shard)
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # torn: it is made again


def _index(folder: Path, shard: Path) -> dict[str, np.ndarray]:
    samples, without = _samples(shard)
    part = {
        "picture": np.array([sample.picture for sample in samples], dtype=np.int64).reshape(-1, 2),
        "text": np.array([sample.text for sample in samples], dtype=np.int64).reshape(-1, 2),
        "json": np.array([sample.json for sample in samples], dtype=np.int64).reshape(-1, 2),
        "is_json": np.array([sample.is_json for sample in samples], dtype=bool),
        "label": np.array([sample.label for sample in samples], dtype=np.int64),
        "without_picture": np.array(without, dtype=np.int64),
    }
    write_atomically(_file_of(folder, shard), lambda file: np.savez(file, **part))
    return part


@dataclass
class _Sample:
    """What the members of one key say."""

    key: str
    picture: tuple[int, int] = (0, -1)
    text: tuple[int, int] = (0, -1)
    json: tuple[int, int] = (0, -1)
    is_json: bool = False
    label: int = -1


def _samples(shard: Path) -> tuple[list[_Sample], int]:
    samples: list[_Sample] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not (stem and suffix):
                    continue
                key = f"{folder}/{stem}".lstrip("/")
                if not samples or samples[-1].key != key:
                    samples.append(_Sample(key))
                _note(samples[-1], suffix.lower(), member, archive, shard)
            end = read_at(shard, archive.offset, tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"data.root: '{shard}' is no whole uncompressed tar ({error}); copy it again, or unpack the compression"
        ) from error
    if end != bytes(tarfile.BLOCKSIZE):  # tarfile takes a torn header for the end
        raise UserError(f"data.root: '{shard}' has no end mark of a tar after {len(samples)} samples; copy it again")
    whole = [sample for sample in samples if sample.picture[1] >= 0]
    return whole, len(samples) - len(whole)


def _note(sample: _Sample, suffix: str, member: tarfile.TarInfo, archive: tarfile.TarFile, shard: Path) -> None:
    place = (member.offset_data, member.size)
    if member.issparse() or member.offset_data + member.size > shard.stat().st_size:
        raise UserError(
            f"data.root: '{member.name}' in '{shard}' says {member.size} bytes, more than the file holds; copy it again"
        )
    if suffix in ("cls", "json") and member.size > MOST_NOTE:
        raise UserError(
            f"data.root: '{member.name}' in '{shard}' has {member.size} bytes, expected at most {MOST_NOTE}"
        )
    if suffix in PICTURES:
        sample.picture = place
    elif suffix == "txt":
        sample.text, sample.is_json = place, False
    elif suffix == "cls":
        sample.label = _label(_content(archive, member), member.name, shard)
    elif suffix == "json":
        try:
            held = json.loads(_content(archive, member))
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.root: '{member.name}' in '{shard}' is no JSON ({error})") from error
        if isinstance(held, dict):
            sample.json = place
            if sample.text[1] < 0 and isinstance(held.get("caption"), str):
                sample.text, sample.is_json = place, True
            if sample.label < 0 and type(held.get("label")) is int:
                sample.label = held["label"]


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """A part of a file; it is opened anew, so that processes do not share a position."""
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    return file.read()


def _label(content: bytes, name: str, shard: Path) -> int:
    try:
        label = int(content)
    except ValueError:
        label = -1
    if label < 0:
        raise UserError(f"data.root: '{name}' in '{shard}' holds {content[:20]!r}, expected a label, 0 or more")
    return label
