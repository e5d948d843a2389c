"""task=sample: pictures from trained weights, as a grid, as files, as ADM's npz."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int, UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from callbacks.checkpoint import checkpoints_in
from callbacks.pictures import class_indices, draw_labels, generate, grid_of, save_png
from callbacks.prompt_files import asked_for
from callbacks.prompts import Wanted, captions_for, rows_of
from datamodules.files import digest_of, sha256_of
from datamodules.own_store import Share
from datamodules.progress import progress
from repalign.errors import UserError, unknown_choice
from repalign.metrics.features import to_uint8
from repalign.training.generate import ImageGenerator, asked_by
from tasks.build import Assembly, assemble, load_weights
from tasks.drawing import Drawing, pictures_of
from tasks.patches import patchwise
from tasks.processes import device, process_group

__all__ = ["generate", "run"]

# The groups of the composition that pictures depend on, beside weights, sampler and guidance.
DRAWN_BY = (
    "backbone",
    "clock",
    "path",
    "parametrization",
    "conditioner",
    "autoencoder",
    "streams",
    "token_io",
    "tuning",
)


def run(cfg: DictConfig) -> None:
    """Draw pictures and write them.

    Raises:
        UserError: one line for a missing checkpoint, an unknown class, or a part that is none.
    """
    task = cfg.task
    if not 0 <= task.part < task.parts:
        raise UserError(f"task.part: found {task.part}, valid: 0 to {task.parts - 1} (task.parts={task.parts})")
    if task.parts > 1 and list(task.write) != ["png"]:
        raise UserError(
            f"task.write: found {list(task.write)}; with task.parts above 1 each process writes [png] alone"
        )
    with process_group() as share:
        if share.parts > 1 and (task.keep is None or task.parts > 1):
            raise UserError(
                "task.keep, task.parts: the processes that torchrun started share the work by the folder of drawn "
                "pictures; name a folder by task.keep and leave task.part and task.parts alone"
            )
        assembly, generator, checkpoint = restored(cfg)
        wanted, told = wanted_labels(cfg, assembly), settings(cfg, checkpoint)
        if share.parts > 1:
            drawing_of(cfg, told, wanted, generator).draw(share)
            dist.barrier()
        if share.part == 0:  # of several processes one writes, from the shards of all
            _write(cfg, told, wanted, generator)


def _write(cfg: DictConfig, told: dict[str, Any], wanted: Wanted, generator: Any) -> None:
    """Draw what is not there yet, and write it in every form that was asked for."""
    task, labels, output = cfg.task, rows_of(wanted), Path(cfg.task.output)
    writers = [_writer(name)(output, len(labels), task.columns) for name in task.write]
    output.mkdir(parents=True, exist_ok=True)
    draw = _draw if task.keep is None else _draw_and_keep
    done = draw(cfg, told, wanted, generator, writers)
    for writer in writers:
        writer.close()
    if not isinstance(wanted, Tensor):
        (output / "captions.json").write_text(json.dumps(list(wanted), indent=2) + "\n")
    (output / "settings.json").write_text(json.dumps(told, indent=2, default=str) + "\n")
    print(f"wrote {done} pictures ({', '.join(task.write)}) to {output}", flush=True)


def _draw(cfg: DictConfig, told: dict[str, Any], wanted: Wanted, generator: Any, writers: Sequence[Writer]) -> int:
    """Draw in the order of the serial numbers, and keep nothing but what the writers write."""
    task, labels = cfg.task, rows_of(wanted)
    serials = range(len(labels))[len(labels) * task.part // task.parts : len(labels) * (task.part + 1) // task.parts]
    own = labels[serials.start : serials.stop]
    done = 0
    with progress("sampling", len(own)) as advance:
        for images in generate(
            generator, wanted[serials.start : serials.stop], task.seed, task.batch_size, device(), serials
        ):
            pictures = to_uint8(images, task.rounding).cpu()
            part = slice(done, done + len(pictures))
            for writer in writers:
                writer.add(serials[part], own[part], pictures)
            done += len(pictures)
            advance(len(pictures))
    return done


def _draw_and_keep(
    cfg: DictConfig, told: dict[str, Any], wanted: Wanted, generator: Any, writers: Sequence[Writer]
) -> int:
    """Draw into shards, then let the writers read them: a run that is killed goes on where it was."""
    task, drawing = cfg.task, drawing_of(cfg, told, wanted, generator)
    labels = drawing.labels
    if task.parts > 1:
        done = 0

        def take(serials: Tensor, pictures: Tensor) -> None:
            nonlocal done
            first = int(serials[0])
            for writer in writers:
                writer.add(range(first, first + len(pictures)), labels[serials], pictures)
            done += len(pictures)

        drawing.draw(Share(task.part, task.parts), take)
        return done
    drawing.draw()
    for serials, own, pictures in pictures_of(drawing.store, task.batch_size):
        for writer in writers:
            writer.add(serials, own, pictures)
    return len(labels)


def restored(cfg: DictConfig) -> tuple[Assembly, ImageGenerator, Path]:
    """The composition with the weights of a checkpoint, ready to draw.

    Raises:
        UserError: when no checkpoint was named and the run folder has none.
    """
    checkpoint = find_weights(cfg.task.checkpoint, Path(cfg.run_dir))
    # As in training: TF32 where the weights are float32 on a GPU.
    torch.set_float32_matmul_precision("high")
    assembly = assemble(cfg)
    load_weights(assembly.module, checkpoint)
    generator = assembly.module.to(device()).eval().generator(ema=cfg.task.ema)
    if cfg.task.get("patches"):
        generator = patchwise(generator, cfg.task.patches)
    return assembly, generator, checkpoint


def find_weights(named: str | None, run_dir: Path) -> Path:
    """The named file, or the newest checkpoint of the run folder.

    Raises:
        UserError: when there is none.
    """
    if named is not None:
        return Path(named)
    found = checkpoints_in(run_dir)
    if not found:
        raise UserError(
            f"task.checkpoint: none named and '{run_dir}' holds none; set task.checkpoint=FILE, or run_dir=FOLDER"
        )
    return found[-1]


def wanted_labels(cfg: DictConfig, assembly: Assembly) -> Wanted:
    """Class of every picture, or its caption where the method reads captions.

    Raises:
        UserError: for a class or captions that the data do not have, or no picture at all.
    """
    task, names = cfg.task, assembly.data.class_names
    if task.num_samples < 1:
        raise UserError(f"task.num_samples: found {task.num_samples}, expected 1 or more")
    if asked_by(assembly.module.conditioner) == "caption":
        return captions_for(task.num_samples, assembly.data.captions, *asked_for(task))
    chosen = range(len(names)) if task.classes is None else class_indices(task.classes, names, "task.classes")
    return draw_labels(task.labels, task.num_samples, task.seed, chosen, assembly.data.source.labels, "task.labels")


def settings(cfg: DictConfig, checkpoint: Path) -> dict[str, Any]:
    """What the pictures depend on, for the file beside them and for the protocol of their scores."""
    wanted = ["ema", "num_samples", "classes", "labels", "prompts", "patches", "seed", "rounding"]
    # Resolved in place: a copied node would look for ${...} in itself.
    task, sampler, guidance = (OmegaConf.to_container(cfg[k], resolve=True) for k in ("task", "sampler", "guidance"))
    assert isinstance(task, dict)
    chosen = {key: task[key] for key in wanted if key in task}
    if task.get("prompts_file") is not None:
        chosen["prompts_file"] = sha256_of(Path(task["prompts_file"]).expanduser())[:16]
    return {
        "recipe": cfg.name,
        "checkpoint": str(checkpoint),
        "weights": sha256_of(checkpoint)[:16],
        **chosen,
        "sampler": sampler,
        "guidance": guidance,
        "dtype": f"float32, matmul {torch.get_float32_matmul_precision()}",
    }


def drawing_of(cfg: DictConfig, told: dict[str, Any], wanted: Wanted, generator: Any) -> Drawing:
    """The shards of this composition's pictures below ``task.keep``."""
    parts = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in DRAWN_BY if cfg.get(key) is not None}
    # Where the weights lie is no matter; what they are is.
    identity = {**{key: value for key, value in told.items() if key != "checkpoint"}, "parts": digest_of(parts)[:16]}
    task = cfg.task
    return Drawing(Path(task.keep), identity, wanted, generator, task.seed, task.batch_size, task.rounding, device())


class Writer(Protocol):
    """Takes pictures in any number of portions."""

    def __init__(self, folder: Path, count: int, columns: int) -> None: ...
    def add(self, serials: range, labels: Int[Tensor, " b"], pictures: UInt8[Tensor, "b 3 h w"]) -> None: ...
    def close(self) -> None: ...


class GridWriter:
    """``grid.png``: a class per row, the first pictures of each; at most 32 rows."""

    MAX_ROWS = 32

    def __init__(self, folder: Path, count: int, columns: int) -> None:
        self.folder, self.columns = folder, columns
        self.rows: dict[int, list[Tensor]] = {}

    def add(self, serials: range, labels: Tensor, pictures: Tensor) -> None:
        for label, picture in zip(labels.tolist(), pictures, strict=True):
            if label not in self.rows and len(self.rows) == self.MAX_ROWS:
                continue
            row = self.rows.setdefault(label, [])
            if len(row) < self.columns:
                row.append(picture.clone())

    def close(self) -> None:
        blank = torch.full_like(next(iter(self.rows.values()))[0], 255)
        columns = max(map(len, self.rows.values()))
        cells = [row + [blank] * (columns - len(row)) for _, row in sorted(self.rows.items())]
        flat = torch.stack([picture for row in cells for picture in row])
        save_png(grid_of(flat.float() / 255, columns), self.folder / "grid.png")


class FolderWriter:
    """``000123.png`` by serial number, so that several processes fill one folder."""

    def __init__(self, folder: Path, count: int, columns: int) -> None:
        self.folder = folder / "png"

    def add(self, serials: range, labels: Tensor, pictures: Tensor) -> None:
        for serial, picture in zip(serials, pictures, strict=True):
            save_png(picture, self.folder / f"{serial:06d}.png")

    def close(self) -> None:
        pass


class ArrayWriter:
    """``samples_NxHxWx3.npz``: arr_0 uint8 [N, H, W, 3], arr_1 the labels; the layout that the ADM evaluator reads.

    Written as the pictures come, in the order of their serial numbers: 50,000 of 256 px are 9.8 GB.
    """

    def __init__(self, folder: Path, count: int, columns: int) -> None:
        self.folder, self.count = folder, count
        self.labels: list[Tensor] = []
        self.archive: zipfile.ZipFile | None = None

    def add(self, serials: range, labels: Tensor, pictures: Tensor) -> None:
        rows = pictures.permute(0, 2, 3, 1).contiguous().numpy()
        if self.archive is None:
            self.shape = (self.count, *rows.shape[1:])
            self.target = self.folder / f"samples_{'x'.join(map(str, self.shape))}.npz"
            self.archive = zipfile.ZipFile(self.target.with_suffix(".incomplete"), "w")
            self.file = self.archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(rows.data)
        self.labels.append(labels)

    def close(self) -> None:
        assert self.archive is not None, "there are pictures"
        self.file.close()
        with self.archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, torch.cat(self.labels).numpy(), allow_pickle=False)
        self.archive.close()
        os.replace(self.target.with_suffix(".incomplete"), self.target)


WRITERS: dict[str, type[Writer]] = {"grid": GridWriter, "png": FolderWriter, "npz": ArrayWriter}


def _writer(name: str) -> type[Writer]:
    if name not in WRITERS:
        raise unknown_choice("task.write", name, WRITERS)
    return WRITERS[name]
