"""task=precompute: latents, encoder features and text features of a data set, computed once and stored.

Training does the same for itself at its start, through the same code; this task does it alone, on another machine or in
several processes. A run that was stopped at any moment goes on with the shards that are missing, and what is written in
the end does not depend on how often it was stopped or by how many processes it was made.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from datamodules.base import ImageDataModule
from datamodules.cache import AS_USUAL, Making
from datamodules.channel_statistics import STATISTICS
from datamodules.outputs import placed
from datamodules.own_store import Share, load_manifest
from datamodules.progress import progress, report_to
from datamodules.repa_layout import import_repa_latents
from datamodules.store import ArrayStore
from repalign.errors import UserError
from repalign.protocols import Autoencoder, Encoder
from tasks.build import stored_text_encoders
from tasks.instantiate import build, check_targets


@dataclass
class Networks:
    """The frozen networks of a composition, and where they run."""

    autoencoder: Autoencoder | None
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    text_encoders: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"


def run(cfg: DictConfig) -> None:
    """Compose the data and the frozen networks, fill the stores, say where they are.

    Raises:
        UserError: one line for whatever the person can mend.
    """
    task = cfg.task
    if not 0 <= task.part < task.parts:
        raise UserError(f"task.part: found {task.part}, valid: 0 to {task.parts - 1} (task.parts={task.parts})")
    if task.processes < 1:
        raise UserError(f"task.processes: expected 1 or more, found {task.processes}")
    if task.repa_latents is not None and task.output is not None:
        raise UserError("task.output: taken-over latents (task.repa_latents) go into the cache; leave one of them out")
    data, networks, making = _parts(cfg)
    if not data.computes and task.processes * task.parts > 1:
        raise UserError("task.processes, task.parts: these data bring their latents along; expected 1 of each")
    data.setup("fit")
    if task.repa_latents is not None and networks.autoencoder is not None:
        fingerprint = str(networks.autoencoder.fingerprint)  # type: ignore[attr-defined]
        import_repa_latents(data.source, networks.autoencoder, fingerprint, task.repa_latents, data.cache_root)
    if task.processes > 1:
        _in_processes(cfg, data, networks, making)
    if task.parts > 1 and not make_share(data, networks, making, Share(task.part, task.parts)):
        print(f"part {task.part} of {task.parts} is done; the last part to end completes the stores", flush=True)
        return
    for name, store in precompute(data, networks, making).items():
        print(f"{name}: {store.folder} ({len(store)} rows)", flush=True)
        if "statistics" in store.info:
            print(_statistics_line(store), flush=True)


def precompute(data: ImageDataModule, networks: Networks, making: Making = AS_USUAL) -> dict[str, ArrayStore]:
    """Make or check every store that training with these networks reads, and let the data's batches carry them.

    Args:
        data: the pictures; its options say what is stored, in which type, and whether both views are.
        networks: the frozen networks.
        making: pictures per call, reading processes, size of shards, folder.

    Returns:
        The stores by name.
    """
    data.setup("fit")
    data.attach_cache(
        networks.autoencoder, networks.encoders, networks.device, text_encoders=networks.text_encoders, making=making
    )
    return data.stores


def make_share(data: ImageDataModule, networks: Networks, making: Making, share: Share) -> bool:
    """Make one process's shards of every store; returns whether all stores are complete."""
    complete = True
    for outputs in data.outputs(networks.autoencoder, networks.encoders, networks.text_encoders, networks.device):
        with placed(outputs.network, networks.device):
            for number, cached in enumerate(data.cached(outputs, making)):
                complete &= cached.make_share(share.moved(number))
    return complete


def _parts(cfg: DictConfig, process: int = 0) -> tuple[ImageDataModule, Networks, Making]:
    check_targets(cfg)
    # As for training: networks with random weights are then the same ones, in every process.
    torch.manual_seed(cfg.seed)
    data = build(cfg.data, "data")
    device = "cpu"
    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        device = f"cuda:{process % torch.cuda.device_count()}"
    networks = Networks(
        build(cfg.autoencoder, "autoencoder"),
        build(cfg.encoders, "encoders"),
        stored_text_encoders(build(cfg.text_encoders, "text_encoders")),
        device,
    )
    folder = None if cfg.task.output is None else Path(cfg.task.output).expanduser()
    return data, networks, Making(cfg.task.batch_size, data.num_workers, cfg.task.shard_mib, folder)


def _in_processes(cfg: DictConfig, data: ImageDataModule, networks: Networks, making: Making) -> None:
    """Let several processes of this machine make its part, and show what they do."""
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    plain = OmegaConf.to_container(cfg, resolve=True)
    children = [context.Process(target=_child, args=(plain, number, done)) for number in range(cfg.task.processes)]
    total, before = _rows(data, networks, making, Share(cfg.task.part, cfg.task.parts))
    if total == before:
        return
    for child in children:
        child.start()
    shown = 0
    try:
        with progress(f"precomputing in {len(children)} processes", total, before) as advance:
            while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
                time.sleep(0.2)
                now = done.value
                advance(now - shown)
                shown = now
    finally:
        failed = [child.exitcode for child in children if child.exitcode]
        for child in children:
            if failed or sys.exc_info()[0]:
                child.terminate()
            child.join()
    if failed:
        raise UserError(
            f"task.processes: {len(failed)} of {len(children)} processes stopped (exit status {failed[0]}); what they "
            "said is above, what they finished is kept"
        )


def _child(plain: dict[str, Any], number: int, done: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cfg = OmegaConf.create(plain)
    torch.set_num_threads(max(1, torch.get_num_threads() // cfg.task.processes))

    def advance(rows: int) -> None:
        with done.get_lock():
            done.value += rows

    report_to(advance)
    # The shares of the processes of a part are together the share of the part.
    share = Share(cfg.task.part + cfg.task.parts * number, cfg.task.parts * cfg.task.processes)
    try:
        data, networks, making = _parts(cfg, number)
        make_share(data, networks, making, share)
    except UserError as error:
        print(f"process {number}: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _rows(data: ImageDataModule, networks: Networks, making: Making, share: Share) -> tuple[int, int]:
    """How many rows a share has to make, and how many are there already."""
    total = before = 0
    for outputs in data.outputs(networks.autoencoder, networks.encoders, networks.text_encoders, networks.device):
        for number, cached in enumerate(data.cached(outputs, making)):
            if (manifest := load_manifest(cached.folder)) is None:
                total += cached.views * len(cached.source) // share.parts
                continue
            mine = [shard for shard in range(manifest.shards) if share.moved(number).has(shard)]
            total += sum(len(manifest.rows_of(shard)) for shard in mine)
            before += sum(len(manifest.rows_of(shard)) for shard in set(mine) - set(manifest.missing()))
    return total, before


def _statistics_line(store: ArrayStore) -> str:
    """Mean and standard deviation per channel, and how a composition takes them."""
    mean, std = ([round(value, 4) for value in store.info["statistics"][key]] for key in ("mean", "std"))
    path = (store.folder / STATISTICS).resolve()
    return (
        f"  latent mean {mean}\n  latent std  {std}\n"
        f"  to normalise with them: latent_norm@autoencoder.norm=file 'autoencoder.norm.path=\"{path}\"'"
    )
