"""task=inpaint: fill in pictures, by a network that was trained for it or by any other."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from callbacks.pictures import generate, grid_of, save_png
from callbacks.prompts import Wanted, captions_for
from datamodules.images import center_crop_to
from datamodules.pictures import DECODING, open_picture
from repalign.autoencoders.latent_norm import require_norm
from repalign.conditioners.hybrid import HybridConditioner
from repalign.conditioners.maps import InpaintingConditioner, random_boxes, resized_mask
from repalign.errors import UserError
from repalign.metrics.features import to_uint8
from repalign.protocols import Conditioner
from repalign.random import SampleRandom
from repalign.samplers.known_region import KnownRegion
from repalign.training.generate import ImageGenerator, asked_by
from tasks.build import Assembly
from tasks.pictures_in import picture_files
from tasks.processes import device
from tasks.sample import restored, settings

BY_STEPS = "ldm_ddim, plms, ddim, ddpm"


def run(cfg: DictConfig) -> None:
    """Write ``grid.png`` (a row per picture: itself, what is known of it, the fillings) and a file per filling.

    Raises:
        UserError: for a missing checkpoint, picture or mask, or parts that cannot fill in.
    """
    task = cfg.task
    assembly, generator, checkpoint = restored(cfg)
    images, masks = pictures_and_masks(cfg, assembly)
    count, rows = len(images), []
    output = Path(task.output)
    (output / "png").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask = (x[number].to(device()) for x in (images, masks))
        drawn = torch.cat(list(fillings(cfg, assembly, generator, image, mask, number)))
        if task.paste:
            drawn = torch.where(mask.cpu() > 0, drawn.cpu(), image.cpu())
        rows += [image.cpu(), torch.where(mask.cpu() > 0, 0.5, image.cpu()), *drawn.cpu()]
        for column, picture in enumerate(to_uint8(drawn.cpu(), task.rounding)):
            save_png(picture, output / "png" / f"{number:06d}_{column}.png")
    save_png(grid_of(torch.stack(rows), task.columns + 2), output / "grid.png")
    told = {**settings(cfg, checkpoint), "paste": task.paste, "fillings": task.columns}
    (output / "settings.json").write_text(json.dumps(told, indent=2, default=str) + "\n")
    print(f"filled in {count} pictures, {task.columns} times each, in {output}", flush=True)


def fillings(
    cfg: DictConfig,
    assembly: Assembly,
    generator: ImageGenerator,
    image: Float[Tensor, "3 h w"],
    mask: Float[Tensor, "1 h w"],
    number: int,
) -> Any:
    """Pictures in [0, 1], batch by batch: ``columns`` fillings of one picture, each a function of seed and place."""
    task, conditioner = cfg.task, assembly.module.conditioner
    serials = range(number * task.columns, (number + 1) * task.columns)
    if reads_masks(conditioner):

        def batch(labels: Tensor, random: Any) -> Mapping[str, Any]:
            # The conditioner takes pictures as bytes hold them, 0 to 255.
            many = (len(labels), -1, -1, -1)
            found = {"label": labels, "image": (255 * image).expand(many), "mask": mask.expand(many)}
            return {**found, "caption": [caption_of(cfg, assembly, number)] * len(labels)} if captioned else found

        captioned = "caption" in conditioner.reads
        wanted: Wanted = torch.full((len(serials),), int(task.classes))
        return generate(replace(generator, examples=batch), wanted, task.seed, task.batch_size, device(), serials)
    if beside := set(conditioner.reads) - {"label", "caption", "size"}:
        raise UserError(
            f"conditioner: {type(conditioner).__name__} reads {', '.join(sorted(beside))}, which a picture to fill in "
            "does not bring; choose a recipe with conditioner=inpaint, or one that reads classes or captions"
        )
    held = replace(generator, sampler=partial(generator.sampler, before_step=known(generator, image, mask)))
    return generate(held, asked(cfg, assembly, len(serials), number), task.seed, task.batch_size, device(), serials)


def reads_masks(conditioner: Conditioner) -> bool:
    """Whether the network was trained to fill in: its conditioner, or a part of a hybrid one, reads masks."""
    parts = conditioner.parts.values() if isinstance(conditioner, HybridConditioner) else [conditioner]
    return any(isinstance(part, InpaintingConditioner) for part in parts)


def known(generator: ImageGenerator, image: Tensor, mask: Tensor) -> KnownRegion:
    """The latent of the picture's known part; a latent place is known when its nearest pixel is.

    Raises:
        UserError: when the sampler takes no step that could be changed.
    """
    if "before_step" not in inspect.signature(type(generator.sampler).__call__).parameters:
        raise UserError(
            f"sampler: {type(generator.sampler).__name__} cannot be held to the known part of a picture; choose "
            f"sampler={BY_STEPS}, or a recipe with conditioner=inpaint, which was trained for it"
        )
    with torch.no_grad():
        raw = generator.autoencoder.encode(image[None]).mean
    latent = require_norm(generator.autoencoder).normalize(raw)
    assert isinstance(latent, Tensor), "an autoencoder gives one stream"
    missing = resized_mask(mask[None], (latent.shape[2], latent.shape[3]))
    return KnownRegion(x_0=latent, mask=1 - missing, path=generator.path)


def asked(cfg: DictConfig, assembly: Assembly, count: int, number: int) -> Wanted:
    """Class or caption of every filling of a picture.

    Raises:
        UserError: for a class that is not there.
    """
    if asked_by(assembly.module.conditioner) == "caption":
        return [caption_of(cfg, assembly, number)] * count
    classes = len(assembly.data.class_names)
    if not 0 <= cfg.task.classes < classes:
        raise UserError(f"task.classes: found {cfg.task.classes}, valid: 0 to {classes - 1}")
    return torch.full((count,), int(cfg.task.classes))


def caption_of(cfg: DictConfig, assembly: Assembly, number: int) -> str:
    """What is asked for in the place of a picture: a prompt in turn, else the caption of the data's picture."""
    captions, prompts = assembly.data.captions, cfg.task.prompts
    if prompts is None and cfg.task.pictures is None and captions:
        return captions[number]
    return captions_for(cfg.task.num_samples, captions, prompts, "task.prompts")[number]


def pictures_and_masks(
    cfg: DictConfig, assembly: Assembly
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 1 h w"]]:
    """Pictures in [0, 1], and 1 where each is missing.

    Raises:
        UserError: for a folder without pictures, a mask that is missing or of another size.
    """
    task, size = cfg.task, assembly.data.image_size
    if task.num_samples < 1 or task.columns < 1:
        raise UserError(f"task.num_samples, task.columns: found {task.num_samples}, {task.columns}, expected 1 or more")
    if task.pictures is None:
        if task.masks is not None:
            raise UserError("task.masks: masks go with a folder of pictures; set task.pictures=FOLDER")
        count = min(task.num_samples, len(assembly.data.source))
        bytes_ = assembly.data.source.load(range(count))[0]
        images = torch.from_numpy(np.ascontiguousarray(bytes_)).float() / 255
        return images, drawn_masks(task.seed, count, size)
    folder = Path(task.pictures).expanduser()
    files = picture_files(folder)[: task.num_samples] if folder.is_dir() else []
    if not files:
        raise UserError(f"task.pictures: no picture in '{folder}'")
    images = torch.stack([_opened(file, "RGB", size) for file in files])
    if task.masks is None:
        return images, drawn_masks(task.seed, len(files), size)
    found = []
    for file in files:
        mask = Path(task.masks).expanduser() / file.relative_to(folder).with_suffix(".png")
        if not mask.is_file():
            raise UserError(f"task.masks: no file '{mask}' for '{file}'")
        found.append((_opened(mask, "L", size) > 0.5).float())
    return images, torch.stack(found)


def drawn_masks(seed: int, count: int, size: int) -> Float[Tensor, "n 1 h w"]:
    """The boxes of training (:func:`repalign.conditioners.maps.random_boxes`), by place."""
    return random_boxes(SampleRandom(seed, range(count)), size, size)


def _opened(file: Path, mode: str, size: int) -> Float[Tensor, "c h w"]:
    try:
        picture = open_picture(file).convert(mode)
    except DECODING as error:
        raise UserError(f"task: cannot read '{file}' ({error})") from error
    if min(picture.size) < size:
        sides = [round(side * size / min(picture.size)) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    values = np.asarray(center_crop_to(picture, size, size, whole=mode == "L"), dtype=np.float32) / 255
    return torch.from_numpy(values[None] if mode == "L" else values.transpose(2, 0, 1).copy())
