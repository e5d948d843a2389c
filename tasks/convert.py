"""task=convert: official checkpoints in, safetensors out, and back."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_modules.generative import Generative
from repalign.backbones.clocks import unwrapped
from repalign.backbones.ddt import DDT
from repalign.backbones.mmdit import MMDiT
from repalign.checkpoints.cross_dit import PixArtAdapter, PixArtDiffusersAdapter
from repalign.checkpoints.ddt import DDTAdapter
from repalign.checkpoints.deepflow import deepflow_adapter
from repalign.checkpoints.dit import KEYS as DIT_KEYS
from repalign.checkpoints.dit import DiTAdapter
from repalign.checkpoints.dit_diffusers import DiTDiffusersAdapter
from repalign.checkpoints.keys import StateDict
from repalign.checkpoints.redi import ReDiAdapter
from repalign.checkpoints.reg import reg_adapter
from repalign.checkpoints.repa import REPAAdapter
from repalign.checkpoints.repa_e import REPAEAdapter
from repalign.checkpoints.sd3 import KEYS as MMDIT_KEYS
from repalign.checkpoints.sd3 import PREFIX, SD3Adapter, SD3DiffusersAdapter
from repalign.checkpoints.sra import SRAAdapter
from repalign.checkpoints.u_repa import URepaAdapter
from repalign.checkpoints.unet import DiffusersUNetAdapter
from repalign.errors import UserError, unknown_choice
from repalign.folders import check_new
from repalign.reading import read_torch
from tasks.build import assemble, load_weights
from tasks.convert_autoencoder import WRITERS as AUTOENCODERS
from tasks.convert_autoencoder import convert_autoencoder
from tasks.convert_diffusers import CONFIGS, dit_config, read_folder, write_folder
from tasks.convert_lora import convert_lora
from tasks.convert_pipeline import PIPELINES, usage, write_pipeline
from tasks.convert_sections import check_first_stage, in_sections, sections_of, stage_of, stage_states
from tasks.convert_unet import conditioner_of, ldm_adapter, unet_of

FORMAT = "repalign"


class Adapter(Protocol):
    """Between an official state dict and the parts of a composition."""

    @property
    def containers(self) -> tuple[str, ...]: ...  # keys of the official file below which the state dict is written
    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]: ...
    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]: ...


def _ddt(module: Generative, task: DictConfig) -> DDTAdapter:
    backbone = unwrapped(module.backbone)
    blocks = (len(backbone.encoder), len(backbone.decoder)) if isinstance(backbone, DDT) else None
    return DDTAdapter(module.latent_shape[0], blocks, list(module.aligners), average=task.weights == "ema")


def _repa(module: Generative, task: DictConfig) -> REPAAdapter:
    keys = MMDIT_KEYS if isinstance(unwrapped(module.backbone), MMDiT) else DIT_KEYS
    return REPAAdapter(list(module.aligners), task.legacy_depth, keys)


def _dit_diffusers(module: Generative, task: DictConfig) -> DiTDiffusersAdapter:
    dit_config(unwrapped(module.backbone))  # refuses a network of another kind
    return DiTDiffusersAdapter(unwrapped(module.backbone).pos_embed.detach().clone())


FAMILIES: Mapping[str, Callable[[Generative, DictConfig], Adapter]] = {
    "dit": lambda module, task: DiTAdapter(),
    "sit": lambda module, task: DiTAdapter(),
    "dit_diffusers": _dit_diffusers,
    "sd3": lambda module, task: SD3Adapter(PREFIX),
    "sd3_diffusers": lambda module, task: SD3DiffusersAdapter(),
    "pixart": lambda module, task: PixArtAdapter(),
    "pixart_diffusers": lambda module, task: PixArtDiffusersAdapter(),
    "repa": _repa,
    "deepflow": lambda module, task: deepflow_adapter(list(module.aligners)),
    "ddt": _ddt,
    "reg": lambda module, task: reg_adapter(list(module.aligners)),
    "redi": lambda module, task: ReDiAdapter(list(module.aligners)),
    "layer_sync": lambda module, task: DiTAdapter(),
    "sra": lambda module, task: SRAAdapter(list(module.aligners)),
    "u_repa": lambda module, task: URepaAdapter(list(module.aligners)),
    "ldm": ldm_adapter,
    "unet_diffusers": lambda module, task: DiffusersUNetAdapter(unet_of(module)),
    "repa_e": lambda module, task: REPAEAdapter(list(module.aligners), task.legacy_depth),
    "sd3_pipeline": lambda module, task: SD3DiffusersAdapter(),
    "dit_pipeline": _dit_diffusers,
    "ldm_pipeline": lambda module, task: DiffusersUNetAdapter(unet_of(module)),
}


def run(cfg: DictConfig) -> None:
    """Convert one file; the composed experiment, or its autoencoder, gives the architecture that the weights must fit.

    Raises:
        UserError: unknown family or direction, unreadable file, weights of another architecture.
    """
    task = cfg.task
    if task.family in AUTOENCODERS:
        return convert_autoencoder(cfg)
    if task.family == "lora":
        return convert_lora(cfg)
    if task.family not in FAMILIES:
        raise unknown_choice("task.family", task.family, (*FAMILIES, "lora", *AUTOENCODERS), "family of checkpoints")
    if task.input is None:
        raise UserError("task.input: not set; give the file to convert")
    source, target = Path(task.input), Path(task.output)
    if not (source.is_file() or (task.family in (*CONFIGS, *PIPELINES) and source.is_dir())):
        raise UserError(f"task.input: no file '{source}'")
    if task.direction == "export" and task.family in (*CONFIGS, *PIPELINES):
        check_new(target)
    assembly = assemble(cfg)
    module: Generative = assembly.module
    adapter = FAMILIES[task.family](module, task)
    target.parent.mkdir(parents=True, exist_ok=True)
    if task.direction == "import":
        parts = adapter.from_official(read_official(source, task.weights, sections_of(adapter)))
        check_first_stage(module, parts, source)
        put_parts(all_parts(module, module.trained), parts, source)
        flat = {f"{part}/{key}": value.contiguous() for part, state in parts.items() for key, value in state.items()}
        _replace(target, lambda file: save_file(flat, file, {"format": FORMAT, "family": task.family}))
    elif task.direction == "export":
        generator = module.generator(ema=task.weights != "live")
        make = PIPELINES.get(task.family)
        pipeline = None if make is None else make(generator, assembly.data.class_names)
        load_weights(module, source)
        owner = module.trained if task.weights == "live" else module.ema.module
        states = {name: part.state_dict() for name, part in {**parts_of(owner), **conditioner_of(module)}.items()}
        official = adapter.to_official({**states, **(stage_states(module) if sections_of(adapter) else {})})
        if pipeline is None:
            write_official(target, task.family, adapter, official, unwrapped(module.backbone))
        else:
            write_pipeline(target, pipeline, generator, official)
            print(usage(pipeline))
    else:
        raise unknown_choice("task.direction", task.direction, ("import", "export"))
    print(f"wrote {target} ({size_of(target) / 2**20:.1f} MiB)")


def write_official(
    target: Path, family: str, adapter: Adapter, official: Mapping[str, Tensor], network: nn.Module
) -> None:
    """A folder for diffusers, .safetensors with the bare tensors, or a file of torch with the official containers.

    Raises:
        UserError: when the family has no file of torch, or the folder holds something.
    """
    if family in CONFIGS:
        write_folder(target, CONFIGS[family](network), official)
    elif target.suffix == ".safetensors":
        _replace(target, lambda file: save_file({key: x.contiguous() for key, x in official.items()}, file))
    elif adapter.containers:
        content = in_sections(official, adapter.containers, sections_of(adapter))
        _replace(target, lambda file: torch.save(content, file))
    else:
        raise UserError(f"task.output: '{target.name}'; {family} checkpoints are .safetensors")


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def parts_of(trained: nn.Module) -> dict[str, nn.Module]:
    """The parts that checkpoints speak of: the network inside its clock, heads of the aligners, running statistics."""
    assert isinstance(trained, nn.ModuleDict)
    aligners = trained["aligners"]
    assert isinstance(aligners, nn.ModuleDict)
    heads = {f"aligners.{name}.head": aligner.get_submodule("head") for name, aligner in aligners.items()}
    norm = {"norm": trained["norm"]} if "norm" in trained else {}
    return {"backbone": unwrapped(trained["backbone"]), **heads, **norm}


def all_parts(module: Generative, owner: nn.Module) -> dict[str, nn.Module]:
    """The parts of the live or the averaged weights, and those that are not averaged: conditioner and first stage."""
    return {**parts_of(owner), **conditioner_of(module), **stage_of(module)}


def put_parts(modules: Mapping[str, nn.Module], parts: Mapping[str, Mapping[str, Tensor]], source: Path) -> None:
    """Load state dicts into modules; heads that sampling does not need may be absent on either side.

    Raises:
        UserError: naming the first key whose shape differs.
    """
    for name, state in parts.items():
        if name not in modules:
            continue
        own = modules[name].state_dict()
        for key in sorted(own.keys() | state.keys()):
            shapes = [tuple(x.shape) if x is not None else "absent" for x in (state.get(key), own.get(key))]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"checkpoint of another architecture: '{name}.{key}' is {shapes[0]} in '{source}', {shapes[1]} in "
                    "this composition; choose the experiment or backbone that the file was trained with"
                )
        modules[name].load_state_dict(dict(state))


def read_official(path: Path, weights: str = "ema", sections: Collection[str] = ()) -> dict[str, Tensor]:
    """State dict of an official file: bare, or under ``ema`` / ``model``; no code from the file is run.

    Args:
        path: .safetensors, or what ``torch.save`` wrote.
        weights: which of the networks in it.
        sections: further networks, which stand beside it; their keys come behind ``<section>.``.

    Raises:
        UserError: when the file is torn, holds code, or holds no state dict.
    """
    if path.is_dir():
        return read_folder(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = read_torch(path)
    except Exception as error:  # the reader raises many kinds; to the person they are one
        raise UserError(f"checkpoint: '{path}' cannot be read safely ({type(error).__name__})") from error
    held = content if isinstance(content, dict) else {}
    further = {f"{name}.{key}": value for name in sections for key, value in held.get(name, {}).items()}
    for key in (weights, "model", "state_dict"):
        if isinstance(held.get(key), dict):
            content = {**held[key], **further}
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"checkpoint: '{path}' holds no state dict; expected tensors by name, or 'ema' / 'model'")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_safetensors(module: Generative, path: Path) -> None:
    """Converted weights into the live and the averaged parts.

    Raises:
        UserError: when the file is torn, not ours, or of another architecture.
    """
    parts = read_parts(path)
    for owner in (module.trained, module.ema.module):
        put_parts(all_parts(module, owner), parts, path)


def read_parts(path: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts by part from a file that ``task=convert`` wrote.

    Raises:
        UserError: when the file is torn or not ours.
    """
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise UserError(f"checkpoint: '{path}' was not written by task=convert; import it first")
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: '{path}' cannot be read ({error})") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return parts


def _replace(target: Path, write: Any) -> None:
    partial = target.with_name(f".{target.name}.incomplete")
    write(partial)
    os.replace(partial, target)
