"""task=convert for whole pipelines: a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from repalign.autoencoders.diffusers_folder import norm_entries
from repalign.autoencoders.diffusers_folder import write_folder as write_autoencoder
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import HasScale
from repalign.backbones.clocks import unwrapped
from repalign.backbones.dit import DiT
from repalign.backbones.unet import UNet
from repalign.checkpoints.unet_config import unet_config
from repalign.conditioners.label import LabelConditioner
from repalign.conditioners.text import JoinedTextConditioner, TextConditioner
from repalign.encoders.text import TextEncoder
from repalign.encoders.text_sd3 import AbsentTextEncoder, CLIPTextEncoder, T5TextEncoder
from repalign.errors import UserError
from repalign.folders import new_folder
from repalign.training.generate import ImageGenerator
from tasks.convert_diffusers import dit_config, sd3_config, write_folder
from tasks.convert_schedulers import CHAIN, FLOW, Schedule, scale_of, schedule_of

DIT_CLASSES = 1000  # DiTPipeline's null class has this number
DIT_PERIOD = 10000 ** (128 / 127)  # with it, the frequencies of the time are those of diffusers' DiT
NOTHING = [None, None]
TEXT_PARTS = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder before its weights are there.

    Attributes:
        name: class of diffusers.
        network: class of its network, sub-folder, and what its ``config.json`` holds.
        autoencoder: sub-folder of the autoencoder.
        schedule: scheduler and number of steps.
        call: further arguments of the call that draws our pictures.
        text: text encoders of ours by the ending of their sub-folders; None for one that is left out.
        entries: further entries of ``model_index.json``.
        notes: lines for the person.
        adapt: a last change of the network's state dict.
    """

    name: str
    network: tuple[str, str, Mapping[str, Any]]
    autoencoder: str
    schedule: Schedule
    call: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    adapt: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda state: state


def sd3_pipeline(generator: ImageGenerator, class_names: Sequence[str]) -> Pipeline:
    """``StableDiffusion3Pipeline`` for an MM-DiT on the straight path, with the text encoders that are there.

    Raises:
        UserError: naming the part that the pipeline cannot express.
    """
    config = sd3_config(unwrapped(generator.backbone))
    schedule, scale = schedule_of(generator, FLOW), scale_of(generator)
    _check_autoencoder(generator, "StableDiffusion3Pipeline", shifts=True)
    conditioner = generator.conditioner
    text: dict[str, Any] = dict.fromkeys(("", "_2", "_3"))
    call: dict[str, Any] = {}
    zeros = False
    if isinstance(conditioner, JoinedTextConditioner):
        kinds = (CLIPTextEncoder, CLIPTextEncoder, T5TextEncoder)
        given = [conditioner.text_encoders[name] for name in conditioner.names]
        if len(given) == len(kinds):
            fits = zip(text, given, kinds, strict=True)
            text = {ending: part if isinstance(part, kind) else None for ending, part, kind in fits}
        call = {"max_sequence_length": given[-1].length}
        zeros = isinstance(given[-1], AbsentTextEncoder)  # as the pipeline does without its third encoder
    return Pipeline(
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", "transformer", {**config, "sample_size": _side(generator)}),
        "vae",
        schedule,
        {"guidance_scale": scale, **call},
        text,
        {"image_encoder": NOTHING, "feature_extractor": NOTHING},
        _without(text, ("prompt_embeds", "pooled_prompt_embeds"), may_miss=("_3",) if zeros else ()),
    )


def dit_pipeline(generator: ImageGenerator, class_names: Sequence[str]) -> Pipeline:
    """``DiTPipeline`` for a DiT on a discrete chain, conditioned by labels.

    The pipeline's null class is number 1000: with fewer classes the table of labels gets copies of the null class.

    Raises:
        UserError: naming the part that the pipeline cannot express.
    """
    network, conditioner = unwrapped(generator.backbone), generator.conditioner
    config = dit_config(network)
    assert isinstance(network, DiT)
    schedule, scale = schedule_of(generator, CHAIN), scale_of(generator)
    _check_autoencoder(generator, "DiTPipeline")
    if not isinstance(conditioner, LabelConditioner):
        raise UserError(f"conditioner: DiTPipeline reads labels, found {type(conditioner).__name__}")
    classes = conditioner.num_classes
    if classes > DIT_CLASSES and scale > 1:
        raise UserError(f"guidance: DiTPipeline's null class is number {DIT_CLASSES}, found {classes} classes")
    power = math.log(network.time_embed.max_period, 10000)
    if not any(math.isclose(power, known, rel_tol=1e-6) for known in (1, 128 / 127)):
        raise UserError(
            f"backbone.max_period: diffusers' DiT has the frequencies of {DIT_PERIOD:.4f}, found "
            f"{network.time_embed.max_period:g}"
        )
    spaced = math.isclose(power, 1, rel_tol=1e-6)
    note = "diffusers' DiT spaces the frequencies of the time as 10000^(-k/127), this network as 10000^(-k/128): its "
    return Pipeline(
        "DiTPipeline",
        ("DiTTransformer2DModel", "transformer", {**config, "num_embeds_ada_norm": max(classes, DIT_CLASSES)}),
        "vae",
        schedule,
        {"guidance_scale": scale},
        entries={"id2label": {str(number): name for number, name in enumerate(class_names)}},
        notes=[note + "pictures differ from ours (docs/text-to-image.md)"] if spaced else [],
        adapt=lambda state: {key: _padded(value) if "class_embedder" in key else value for key, value in state.items()},
    )


def ldm_pipeline(generator: ImageGenerator, class_names: Sequence[str]) -> Pipeline:
    """``StableDiffusionPipeline`` for a U-Net with text as its context, ``LDMPipeline`` for one without a condition.

    Raises:
        UserError: naming the part that the pipeline cannot express.
    """
    network, conditioner = unwrapped(generator.backbone), generator.conditioner
    config = unet_config(network)
    assert isinstance(network, UNet)
    if network.concat_channels or network.label_embed is not None:
        found = "a map beside the latent" if network.concat_channels else "a label beside the time"
        raise UserError(f"conditioner: diffusers has a pipeline for text or for no condition, and here is {found}")
    schedule, scale = schedule_of(generator, CHAIN), scale_of(generator)
    if network.context_dim is None:
        _check_autoencoder(generator, "LDMPipeline")
        if scale != 1:
            raise UserError("guidance: LDMPipeline has no condition to guide by; set guidance=none")
        return Pipeline("LDMPipeline", ("UNet2DModel", "unet", config), "vqvae", schedule, {})
    _check_autoencoder(generator, "StableDiffusionPipeline")
    if not isinstance(conditioner, TextConditioner):
        raise UserError(f"conditioner: StableDiffusionPipeline reads text, found {type(conditioner).__name__}")
    if schedule.config["steps_offset"] != 1:
        raise UserError("sampler: StableDiffusionPipeline sets the offset of the steps to 1; set steps=ldm50 or so")
    encoder = conditioner.text_encoders[conditioner.encoder]
    text = {"": encoder if isinstance(encoder, (TextEncoder, T5TextEncoder)) else None}
    return Pipeline(
        "StableDiffusionPipeline",
        ("UNet2DConditionModel", "unet", config),
        "vae",
        schedule,
        {"guidance_scale": scale},
        text,
        {
            **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), NOTHING),
            "requires_safety_checker": False,
        },
        _without(text, ("prompt_embeds",)),
    )


PIPELINES: Mapping[str, Callable[[ImageGenerator, Sequence[str]], Pipeline]] = {
    "sd3_pipeline": sd3_pipeline,
    "dit_pipeline": dit_pipeline,
    "ldm_pipeline": ldm_pipeline,
}


def write_pipeline(folder: Path, pipeline: Pipeline, generator: ImageGenerator, state: Mapping[str, Tensor]) -> None:
    """The whole folder: ``model_index.json``, network, autoencoder, scheduler, text encoders, and how it is called.

    Args:
        folder: target; must not exist, or be empty.
        pipeline: what to write.
        generator: whose autoencoder and latent norm go along.
        state: the network's, in diffusers' keys.

    Raises:
        UserError: when the folder holds something, or the autoencoder is none of diffusers'.
    """
    assert isinstance(generator.autoencoder, SDAutoencoder)
    kind, place, config = pipeline.network
    index = {
        "_class_name": pipeline.name,
        "_diffusers_version": version("diffusers"),
        place: ["diffusers", kind],
        pipeline.autoencoder: ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", pipeline.schedule.config["_class_name"]],
        **pipeline.entries,
    }
    with new_folder(folder) as partial:
        write_folder(partial / place, config, pipeline.adapt(state))
        write_autoencoder(partial / pipeline.autoencoder, generator.autoencoder.network, cast(HasScale, generator.norm))
        (partial / "scheduler").mkdir()
        _write_json(partial / "scheduler" / "scheduler_config.json", pipeline.schedule.config)
        for ending, encoder in pipeline.text.items():
            names = [f"{part}{ending}" for part in TEXT_PARTS]
            if encoder is None:
                index |= dict.fromkeys(names, NOTHING)
                continue
            network, tokenizer = encoder.network, encoder.tokenizer
            if isinstance(encoder, TextEncoder):
                network.config.use_attention_mask = True  # what StableDiffusionPipeline goes by
            tokenizer.model_max_length = encoder.length
            for name, part in zip(names, (network, tokenizer), strict=True):
                part.save_pretrained(partial / name)
                index[name] = ["transformers", type(part).__name__]
        _write_json(partial / "model_index.json", index)
        (partial / "README.md").write_text(f"---\nlibrary_name: diffusers\n---\n\n{usage(pipeline)}\n", "utf-8")


def usage(pipeline: Pipeline) -> str:
    """How the folder is called to draw what ``task=sample`` draws, and what is missing in it."""
    call = {"num_inference_steps": pipeline.schedule.steps, **pipeline.call}
    words = ", ".join(f"{name}={value}" for name, value in call.items())
    return "\n".join([f"{pipeline.name}: as here with {words}", *pipeline.notes])


def _check_autoencoder(generator: ImageGenerator, pipeline: str, shifts: bool = False) -> None:
    autoencoder, norm = generator.autoencoder, generator.norm
    if not isinstance(autoencoder, SDAutoencoder):
        raise UserError(
            f"autoencoder: {pipeline} decodes by diffusers' AutoencoderKL, found {type(autoencoder).__name__}; compose "
            "the recipe with sd_vae or sd3_vae"
        )
    numbers = norm_entries(cast(HasScale, norm)) if hasattr(norm, "scale") and hasattr(norm, "bias") else None
    if numbers is None or numbers["latents_mean"] is not None or (numbers["shift_factor"] and not shifts):
        reads = "one scale and one shift" if shifts else "one scale and no shift"
        raise UserError(f"autoencoder.norm: {pipeline} reads {reads} for all channels, found {norm}")


def _side(generator: ImageGenerator) -> int:
    assert not isinstance(generator.latent_shape, Mapping), "a state of one stream"
    return int(generator.latent_shape[-1])


def _without(text: Mapping[str, Any], arguments: Sequence[str], may_miss: Sequence[str] = ()) -> list[str]:
    """A line on the text encoders that are left out; without some of them the pipeline reads no prompts."""
    absent = [ending for ending, encoder in text.items() if encoder is None]
    load = ", ".join(f"{part}{ending}=None" for ending in absent for part in TEXT_PARTS)
    given = ", ".join([*arguments, *(f"negative_{name}" for name in arguments)])
    call = "" if set(absent) <= set(may_miss) else f"; call it with {given}"
    return [f"text encoders are left out: load it with {load}{call}"] if absent else []


def _padded(table: Tensor) -> Tensor:
    """Rows of the null class up to number 1000."""
    return torch.cat([table, table[-1:].expand(max(0, DIT_CLASSES + 1 - len(table)), -1)])


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
