"""From a composed configuration to the objects of a run; sizes that depend on each other meet here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from callbacks import checkpoint
from datamodules.examples import examples_of
from lightning_modules.diffusion import DiffusionModule
from repalign.autoencoders.latent_norm import require_norm
from repalign.conditioners.derive import derived
from repalign.encoders.streams import state_shape
from repalign.encoders.text_sd3 import AbsentTextEncoder
from repalign.errors import UserError
from repalign.protocols import Autoencoder, Conditioner, Encoder, TextEncoder
from repalign.seals import require_whole
from repalign.training.generate import Examples, asked_by
from tasks.instantiate import build, check_targets


@dataclass
class Assembly:
    """The objects of one composition."""

    data: Any
    autoencoder: Autoencoder
    encoders: Mapping[str, Encoder]
    module: Any
    text_encoders: Mapping[str, TextEncoder]


def assemble(cfg: DictConfig, data: Any = None) -> Assembly:
    """Build data, autoencoder, encoders and the method's LightningModule.

    The latent shape comes from the data's image size and the autoencoder, shapes of further streams from encoders, the
    number of classes from the data, the widths of heads from taps and encoders: none is typed in a configuration.

    Args:
        cfg: checked.
        data: stands for the data of the configuration where only sizes are wanted; None builds them.

    Raises:
        UserError: one line for a part that cannot be built or a pair that does not fit.
    """
    check_targets(cfg)
    torch.manual_seed(cfg.seed)
    data = build(cfg.data, "data") if data is None else data
    autoencoder = build(cfg.autoencoder, "autoencoder")
    make_module = build(cfg.method, "method")
    if issubclass(make_module.func, DiffusionModule):
        require_norm(autoencoder)
    if data.image_size % autoencoder.downsampling:
        raise UserError(
            f"data.image_size: {data.image_size} is no multiple of the autoencoder's downsampling "
            f"{autoencoder.downsampling}"
        )
    side = data.image_size // autoencoder.downsampling
    latent_shape = (autoencoder.channels, side, side)
    # Without aligners and further streams nobody reads an encoder: none is built, whatever `encoder=` says.
    encoders = build(cfg.encoders, "encoders") if cfg.aligners or cfg.streams else {}
    features = {name: encoder.spec for name, encoder in encoders.items()}
    streams = {
        name: make(features=features, latent_shape=latent_shape) for name, make in build(cfg.streams, "streams").items()
    }
    shape = state_shape(latent_shape, streams)
    make_conditioner = build(cfg.conditioner, "conditioner")
    # Without a conditioner that reads texts, no language model is built, whatever `text_encoder=` says.
    asks = "text_encoders" in inspect.signature(make_conditioner).parameters
    text_encoders = build(cfg.text_encoders, "text_encoders") if asks else {}
    conditioner: Conditioner = derived(
        make_conditioner, num_classes=data.num_classes, text_encoders=text_encoders, autoencoder=autoencoder
    )
    # The backbone is built last of the parts that have weights, and from its own seed: its initial weights do not
    # depend on which encoder stands beside it.
    torch.manual_seed(cfg.seed)
    backbone = conditioned(
        build(cfg.backbone, "backbone"), conditioner, latent_shape=shape, num_classes=data.num_classes
    )
    check_sizes(data, conditioner, backbone)
    backbone = build(cfg.tuning, "tuning")(backbone)
    module = make_module(
        backbone=build(cfg.clock, "clock")(backbone),
        autoencoder=autoencoder,
        encoders=encoders,
        aligners=build(cfg.aligners, "aligners"),
        conditioner=conditioner,
        latent_shape=shape,
        streams=streams,
        examples=examples_for(data, conditioner),
    )
    module.run_dir = Path(cfg.run_dir)
    check_pairs(data, module)
    if module.trains_autoencoder and data.cache_latents:
        raise UserError(
            f"data.cache_latents: {type(module).__name__} trains the autoencoder, so stored latents would soon be "
            "those of another one; set data.cache_latents=false (data=latents has no pictures to train it on)"
        )
    return Assembly(data, autoencoder, encoders, module, stored_text_encoders(conditioner.text_encoders))


def conditioned(make: Callable[..., Any], conditioner: Conditioner, **sizes: Any) -> Any:
    """The backbone, made for what the conditioner gives.

    Raises:
        UserError: when it does not read what the conditioner gives, or reads text and gets none.
    """
    given = {name: getattr(conditioner, name) for name in ("context_dim", "pooled_dim", "concat_channels")}
    name, names = getattr(make, "func", make).__name__, inspect.signature(make).parameters
    kind = type(conditioner).__name__
    if given["context_dim"] and "context_dim" not in names:
        raise UserError(f"backbone: {name} reads no text, which conditioner={kind} gives; set backbone=mmdit_d24 or so")
    if given["concat_channels"] and "concat_channels" not in names:
        raise UserError(f"backbone: {name} reads no map, which conditioner={kind} gives; set backbone=unet_f8 or so")
    if not given["context_dim"] and "context_dim" in names and "num_classes" not in names:
        raise UserError(f"conditioner: {kind} gives no text, which backbone={name} reads; set conditioner=text")
    return derived(make, **sizes, **given)


def check_sizes(data: Any, conditioner: Conditioner, backbone: Any) -> None:
    """Sizes of pictures as a condition: data that give them, a conditioner and a backbone that read them, or none.

    Raises:
        UserError: naming the part that does not fit.
    """
    conditioned_on, reads = "size" in conditioner.reads, getattr(backbone, "reads_size", False)
    if conditioned_on and not reads:
        raise UserError(
            "backbone: reads no sizes of pictures, which the conditioner gives; set backbone=cross_dit_xl_size, or "
            "conditioner=text"
        )
    if reads and not conditioned_on:
        raise UserError(
            "conditioner: gives no sizes of pictures, which the backbone reads; set conditioner=text_and_size, or "
            "backbone.modulation.size=false"
        )
    if conditioned_on and not getattr(data, "sizes", False):
        raise UserError(
            f"data: {type(data).__name__} gives no sizes of pictures, which the conditioner reads; set data.sizes=true "
            "with data=image_text or another captioned set, or conditioner=text"
        )


def check_pairs(data: Any, module: Any) -> None:
    """Pairs of pictures for an objective that compares them, single pictures for the others.

    Raises:
        UserError: naming the two parts that do not go together.
    """
    objective = getattr(module, "objective", None)
    given, wanted = getattr(data, "pairs", False), getattr(objective, "pairs", False)
    if wanted and not given:
        raise UserError(
            f"objective and data do not go together: {type(objective).__name__} compares two pictures of a prompt, "
            f"{type(data).__name__} has single ones; set data=pairs_folder or pick_a_pic"
        )
    if given and not wanted:
        raise UserError(
            f"objective and data do not go together: {type(data).__name__} has preferred and rejected pictures, of "
            f"which {type(objective or module).__name__} would learn both; set objective=diffusion_dpo"
        )


def stored_text_encoders(text_encoders: Mapping[str, TextEncoder]) -> dict[str, TextEncoder]:
    """Those whose states are worth a store: the zeros of one that is left out are not."""
    return {name: part for name, part in text_encoders.items() if not isinstance(part, AbsentTextEncoder)}


def examples_for(data: Any, conditioner: Conditioner) -> Examples | None:
    """What the conditioner reads besides a label or a caption, for pictures that are drawn: of the data's own pictures.

    Raises:
        UserError: when it reads pictures and batches would not carry them.
    """
    beside = set(conditioner.reads) - {asked_by(conditioner), "size"}
    if not beside:
        return None
    if "image" in beside and not data.keep_images:
        raise UserError(
            f"data.keep_images: false, but {type(conditioner).__name__} reads pictures; set data.keep_images=true"
        )
    return partial(examples_of, data, with_images="image" in beside)


def load_weights(module: DiffusionModule, path: str | Path) -> None:
    """Weights and average of a training checkpoint (.ckpt), or weights that ``task=convert`` wrote (.safetensors).

    Raises:
        UserError: when the file is missing, torn, or of another architecture.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"checkpoint: no file '{file}'; give a .ckpt of a run folder or a .safetensors of task=convert")
    if file.suffix == ".safetensors":
        from tasks.convert import load_safetensors

        load_safetensors(module, file)
        return
    module.load_state_dict(read_checkpoint(file))


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The weights of a training checkpoint; no code from the file is run.

    Raises:
        UserError: when the file is torn or foreign.
    """
    require_whole(file)
    try:
        content = checkpoint.read_checkpoint(file, optimizers=False)
    except Exception as error:
        raise UserError(
            f"checkpoint: '{file}' cannot be read ({type(error).__name__}); is it torn or foreign?"
        ) from error
    if "state_dict" not in content:
        raise UserError(f"checkpoint: '{file}' is no training checkpoint of this project; import it by task=convert")
    return content["state_dict"]
