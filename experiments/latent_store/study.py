"""The latent store: how fast it writes and reads, and what it does when it is killed, damaged or shared out.

    python experiments/latent_store/study.py [FOLDER]

About five minutes on two cores and 1.5 GB in FOLDER (default: a temporary one). Writes results.md beside this file.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from datamodules.cache import Making, manifest_for  # noqa: E402
from datamodules.channel_statistics import STATISTICS  # noqa: E402
from datamodules.latents import LatentDataModule  # noqa: E402
from datamodules.own_store import Share, ensure_store  # noqa: E402
from datamodules.progress import Advance  # noqa: E402
from datamodules.store import ArrayStore  # noqa: E402
from datamodules.synthetic import SyntheticDataModule  # noqa: E402
from repalign.autoencoders.small_kl import SmallKLAutoencoder  # noqa: E402
from repalign.errors import UserError  # noqa: E402
from tasks.precompute import Networks, make_share, precompute  # noqa: E402

ROWS, BATCH, SHARDS = 20_000, 64, 100
SHAPE = (2, 4, 32, 32)  # mean and standard deviation of SD-VAE's latents at 256 px, float16: 16 KiB
ROUNDS, BATCHES = 9, 250
AUTOENCODER = SimpleNamespace(fingerprint="study")

lines: list[str] = []


def say(line: str = "") -> None:
    """Print, and keep for results.md."""
    print(line, flush=True)
    lines.append(line)


class Labels:
    """A picture source of which only the labels are read."""

    image_size, captions, attribution, has_images = 256, None, None, False
    fingerprint = "study"
    class_names = tuple(str(i) for i in range(1000))
    labels = np.arange(ROWS) % 1000

    def __len__(self) -> int:
        return ROWS

    def load(self, indices: Any) -> Any:
        """There are no pictures."""
        raise NotImplementedError


def block() -> np.ndarray:
    """512 made-up latents that are repeated; the content does not matter, nothing is compressed."""
    return np.random.default_rng(0).standard_normal((512, *SHAPE)).astype(np.float16)


def write_store(folder: Path, latents: np.ndarray, shard_mib: float) -> ArrayStore:
    """A store of latents, labels and indices, as task=precompute makes it, without the network."""
    source = Labels()
    header = {"name": "latents", "fingerprint": "study", "source": "study", "pictures": ROWS, "image_size": 256}
    header |= {"views": 1, "crop": "none", "dtype": "float16"}

    def arrays(rows: range, advance: Advance) -> dict[str, np.ndarray]:
        index = np.arange(rows.start, rows.stop)
        return {"moments": latents[index], "index": index, "label": source.labels[index]}

    def plan() -> Any:
        return manifest_for(source, header, arrays(range(1), lambda rows: None), shard_mib)

    return ensure_store(folder / "latents", "writing", plan, arrays, header=header)


def write_plain(path: Path, latents: np.ndarray) -> None:
    """One .npy file."""
    with open(path, "wb") as file:
        np.save(file, latents)
        file.flush()
        os.fsync(file.fileno())


def write_files(folder: Path, latents: np.ndarray) -> None:
    """One .npy file per sample, as REPA's preparation does; without waiting for the disk, as there."""
    for row, latent in enumerate(latents):
        path = folder / f"{row // 1000:05d}"
        if row % 1000 == 0:
            path.mkdir(parents=True)
        np.save(path / f"{row:08d}.npy", latent)


class Plain(Dataset[Any]):
    """A memory-mapped array, gathered a batch at a time; nothing but the latents."""

    def __init__(self, path: Path) -> None:
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitems__(self, rows: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.array[rows])


class Labelled(Plain):
    """The same with the two numbers per sample that training needs beside a latent."""

    def __getitems__(self, rows: list[int]) -> Any:
        index = np.array(rows)
        return torch.from_numpy(self.array[index]), torch.from_numpy(Labels.labels[index]), torch.from_numpy(index)


class Bare:
    """The copy alone, without any loader: batches of a permutation drawn beforehand, never with workers."""

    def __init__(self, labelled: Labelled) -> None:
        self.labelled = labelled

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            order = np.random.default_rng(epoch).permutation(ROWS)
            for first in range(0, ROWS - BATCH + 1, BATCH):
                index = order[first : first + BATCH]
                yield (
                    torch.from_numpy(self.labelled.array[index]),
                    torch.from_numpy(Labels.labels[index]),
                    torch.from_numpy(index),
                )


class Files(Dataset[Any]):
    """One file per sample."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self.paths[row]))


def as_it_is(batch: Any) -> Any:
    """Batches that are gathered whole."""
    return batch


def ours(root: Path) -> Callable[[int], Iterable[Any]]:
    """The stream of training: latents, labels, numbers, in the order of the sampler. Opened once, like the others."""
    data = LatentDataModule(root=root, image_size=256, batch_size=BATCH, verify="size")
    data.attach_cache(AUTOENCODER)  # type: ignore[arg-type]

    def loader(workers: int) -> Iterable[Any]:
        data.num_workers = workers
        return data.train_dataloader()

    return loader


def shuffled(dataset: Dataset[Any], workers: int, whole: bool) -> Iterable[Any]:
    """PyTorch's own shuffling loader."""
    return DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, collate_fn=as_it_is if whole else None
    )


def read_rate(loader: Iterable[Any]) -> float:
    """Samples per second after the start of the workers."""
    batches = iter(loader)
    for _ in range(10):
        next(batches)
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return BATCHES * BATCH / (time.perf_counter() - began)


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def speed(folder: Path) -> None:
    """Write and read rates, alternating; medians."""
    latents = np.concatenate([block()] * 40)[:ROWS]
    writers: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        f"store, {SHARDS} shards": (
            folder / "many",
            lambda path: write_store(path, latents, ROWS / SHARDS * latents[0].nbytes / 2**20),
        ),
        "store, shards of 256 MiB": (folder / "few", lambda path: write_store(path, latents, 256)),
        "one .npy": (folder / "plain.npy", lambda path: write_plain(path, latents)),
        "one file per sample": (folder / "files", lambda path: write_files(path, latents)),
    }
    say("| written as | samples/s | bytes per sample |\n|---|---|---|")
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(3):
        for name, (path, write) in writers.items():
            shutil.rmtree(path, ignore_errors=True)
            began = time.perf_counter()
            write(path)
            rates[name].append(ROWS / (time.perf_counter() - began))
    for name, (path, _) in writers.items():
        say(f"| {name} | {statistics.median(rates[name]):,.0f} | {size_of(path) / ROWS:,.1f} |")
    say()
    say("| read from, samples/s | 0 workers | 1 | 2 |\n|---|---|---|---|")
    plain, labelled, files = Plain(folder / "plain.npy"), Labelled(folder / "plain.npy"), Files(folder / "files")
    readers: dict[str, Callable[[int], Iterable[Any]]] = {
        "one memory-mapped .npy, a bare loop": lambda workers: Bare(labelled),
        "one memory-mapped .npy, latents alone": lambda workers: shuffled(plain, workers, True),
        "one memory-mapped .npy, with labels": lambda workers: shuffled(labelled, workers, True),
        f"store, {SHARDS} shards": ours(folder / "many"),
        "store, shards of 256 MiB": ours(folder / "few"),
        "one file per sample": lambda workers: shuffled(files, workers, False),
    }
    for read in readers.values():
        read_rate(read(0))  # warms the page cache
    found: dict[tuple[str, int], list[float]] = {(name, w): [] for name in readers for w in (0, 1, 2)}
    for _ in range(ROUNDS):
        for workers in (0, 1, 2):
            for name, read in readers.items():
                found[name, workers].append(read_rate(read(workers)))
    for name in readers:
        rates = [f"{statistics.median(found[name, w]):,.0f}" for w in (0, 1, 2)]
        say(f"| {name} | " + " | ".join(rates) + " |")
    # Rounds are compared one by one: other work on the machine changes from round to round.
    for name in (name for name in readers if name.startswith("store")):
        for other in (name for name in readers if not name.startswith("store")):
            pairs = [zip(found[name, w], found[other, w], strict=True) for w in (0, 1, 2)]
            shares = [f"{statistics.median(ours / theirs for ours, theirs in pair):.2f}" for pair in pairs]
            say(f"| {name} / {other} | " + " | ".join(shares) + " |")
    say()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def forked(work: Callable[[], Any]) -> int:
    """Work in a child process; its number."""
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the child ends by os._exit)
        torch.set_num_threads(1)
        try:
            work()
        except BaseException as error:
            print(f"child: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def wait_for(children: list[int]) -> list[int]:
    """Exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed(folder: Path) -> None:
    """SIGKILL at random moments; the final store against one that nobody disturbed."""
    torch.manual_seed(0)
    networks = Networks(SmallKLAutoencoder(weights="random", channels=8, downsampling=8, width=32, norm=None).eval())
    making = Making(batch=16, shard_mib=0.25)

    def data(name: str) -> SyntheticDataModule:
        return SyntheticDataModule(
            batch_size=8, image_size=64, size=4096, cache_root=folder / name, horizontal_flip=True
        )

    began = time.perf_counter()
    assert wait_for([forked(lambda: precompute(data("whole"), networks, making))]) == [0]
    took = time.perf_counter() - began
    expected = contents(folder / "whole")
    draw = random.Random(0)
    for processes in (1, 2):
        name = f"killed_{processes}"
        works = [
            lambda part=part, name=name, n=processes: (
                make_share(data(name), networks, making, Share(part, n))
                if n > 1
                else precompute(data(name), networks, making)
            )
            for part in range(processes)
        ]
        moments = [draw.uniform(0.05, 0.25) * took / processes for _ in range(5)]
        hit = 0
        for moment in moments:
            children = [forked(work) for work in works]
            time.sleep(moment)
            for child in children:
                os.kill(child, signal.SIGKILL)
            hit += wait_for(children).count(-signal.SIGKILL)
        shards = len(list((folder / name).rglob("shard.*.json")))
        wait_for([forked(work) for work in works])
        assert wait_for([forked(lambda name=name: precompute(data(name), networks, making))]) == [0]
        found = contents(folder / name)
        after = ", ".join(f"{moment:.2f}" for moment in moments)
        whole = len(list((folder / name).rglob("moments.*")))
        same = "bit-identical" if found == expected else "DIFFERENT"
        say(
            f"- {processes} process(es), undisturbed {took:.1f} s, SIGKILL after {after} s ({hit} processes died at "
            f"work; {shards} of {whole} shards were there then): {len(found)} files, {same}"
        )
    say()


def damaged(folder: Path) -> None:
    """1 of 100 shards truncated, flipped, missing or exchanged, under each policy."""
    say("| damage to 1 of 100 shards | policy | what happens |\n|---|---|---|")
    shard, other = (folder / "many" / "latents" / f"moments.{number:05d}.npy" for number in (41, 42))
    whole, neighbour, at = shard.read_bytes(), other.read_bytes(), 2_345_678
    cases: dict[str, Callable[[], Any]] = {
        "truncated": lambda: os.truncate(shard, 1_000_001),
        "one bit flipped": lambda: shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]),
        "missing": shard.unlink,
        "exchanged with the next": lambda: (shard.write_bytes(neighbour), other.write_bytes(whole)),
    }
    for damage, hurt in cases.items():
        hurt()
        for policy in ("stop", "skip"):
            data = LatentDataModule(root=folder / "many", image_size=256, batch_size=BATCH, on_corrupt=policy)
            began = time.perf_counter()
            try:
                data.attach_cache(AUTOENCODER)  # type: ignore[arg-type]
            except UserError as error:
                told = str(error).replace(str(folder), "...")
                say(f"| {damage} | stop | refused after {time.perf_counter() - began:.2f} s: {told} |")
                continue
            stream = iter(data.train_dataloader())
            seen = np.concatenate([next(stream)["index"].numpy() for _ in range(-(-ROWS // BATCH))])[:ROWS]
            counts = np.bincount(seen, minlength=ROWS)
            say(
                f"| {damage} | skip | {(counts == 0).sum()} pictures never read, {(counts == 1).sum():,} once, "
                f"{(counts > 1).sum()} in their place again (most: {counts.max()} times) |"
            )
        shard.write_bytes(whole)
        other.write_bytes(neighbour)
    say()


def accounting(folder: Path) -> None:
    """Every sample of two epochs, counted."""
    batch = 66  # 20,000 is no multiple of it: epochs end inside batches
    steps = -(-2 * ROWS // batch)

    def read(world: int, start: int, stop: int, workers: int) -> list[torch.Tensor]:
        rows = []
        for rank in range(world):
            data = LatentDataModule(
                root=folder / "many", image_size=256, batch_size=batch, num_workers=workers, verify="size"
            )
            data.attach_cache(AUTOENCODER)  # type: ignore[arg-type]
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
            data.set_start(start)
            stream = iter(data.train_dataloader())
            for _ in range(start, stop):
                found = next(stream)
                rows.append(torch.stack([found["serial"], found["index"]], 1))
        return rows

    say("| ranks | workers | samples of 2 epochs | lost | twice | same as 1 rank |\n|---|---|---|---|---|---|")
    reference: np.ndarray | None = None
    for name, parts in {
        "1": [(1, 0, steps)],
        "2": [(2, 0, steps)],
        "3": [(3, 0, steps)],
        "3, from step 200 on 2": [(3, 0, 200), (2, 200, steps)],
    }.items():
        for workers in (0, 2):
            joined = torch.cat(
                [row for world, start, stop in parts for row in read(world, start, stop, workers)]
            ).numpy()
            joined = joined[joined[:, 0].argsort()]
            reference = joined if reference is None else reference
            counts = [np.bincount(joined[e * ROWS : (e + 1) * ROWS, 1], minlength=ROWS) for e in range(2)]
            lost, twice = sum(int((c == 0).sum()) for c in counts), sum(int((c > 1).sum()) for c in counts)
            same = "yes" if np.array_equal(joined, reference) else "NO"
            say(f"| {name} | {workers} | {2 * ROWS:,} | {lost} | {twice} | {same} |")
    say()


def main() -> None:
    """All of it."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        study(folder)
    else:
        with tempfile.TemporaryDirectory() as name:
            study(Path(name))
    (HERE / "results.md").write_text("\n".join(lines), encoding="utf-8")


def study(folder: Path) -> None:
    """The sections of results.md."""
    torch.set_num_threads(1)
    for title, section in (
        ("Speed", speed),
        ("Killed", killed),
        ("Damaged", damaged),
        ("Accounting", accounting),
    ):
        say(f"## {title}\n")
        section(folder)
    assert (folder / "many" / "latents" / STATISTICS).exists()


if __name__ == "__main__":
    main()
