"""Checks of a composed configuration that need no object: keys, types, missing values, targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, nearest, unknown_choice
from tasks.check_scores import check_scores
from tasks.instantiate import build, check_targets, objects, texts
from tasks.kinds import WORDS, check_kinds
from tasks.ranges import check_ranges
from tasks.signatures import arguments_of
from tasks.surface import (
    TOP_LEVEL,
    check_files,
    check_interpolations,
    check_sizes,
    check_structure,
    check_text,
)


def check_names(words: Iterable[str], choices: Callable[[str], list[str]]) -> None:
    """Names of choices are texts; Hydra answers ``compile=true`` with a traceback.

    Args:
        words: of the command line that choose of a group.
        choices: of a group.

    Raises:
        UserError: for a truth value or a number.
    """
    parsed: list[Override] = OverridesParser.create().parse_overrides([word for word in words if "=" in word])
    for override in parsed:
        if not override.is_sweep_override() and isinstance(override.value(), (bool, int, float)):
            group, value = override.key_or_group, (override.input_line or "").partition("=")[2]
            raise unknown_choice(group, value, choices(group), f"choice of group '{group}'")


def check_types(plain: DictConfig, cfg: DictConfig, overrides: list[str]) -> None:
    """Values given on the command line against the type of what they replace.

    Args:
        plain: composed from the group choices alone.
        cfg: composed with every override.
        overrides: the value overrides, as typed.

    Raises:
        UserError: naming the key, what was found and what was expected.
    """
    for word in overrides:
        key = word.split("=")[0].lstrip("+~")
        if word.startswith(("+", "~")):
            continue
        try:
            before, after = OmegaConf.select(plain, key), OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            continue  # an interpolation that only the run can resolve
        if before is None or after is None or before == "auto":  # which stands for a number or a name
            continue
        expected, found = _kind(before), _kind(after)
        if expected != found and not (expected is float and found is int):
            raise UserError(f"{key}: expected {WORDS[expected]} like {before!r}, found {after!r}")


def _kind(value: Any) -> type:
    if isinstance(value, ListConfig):
        return list
    if isinstance(value, DictConfig):
        return dict
    return type(value)


def check_composition(cfg: DictConfig) -> None:
    """Top-level keys, missing values, targets and the names of every object's arguments.

    Raises:
        UserError: for the first thing that is wrong.
    """
    for key in cfg:
        if key not in TOP_LEVEL:
            raise UserError(f"unknown top-level key '{key}' in the recipe.{nearest(str(key), TOP_LEVEL)}")
    check_structure(cfg)
    check_references(cfg)
    check_interpolations(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: has no value yet; set {missing[0]}=...")
    check_targets(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    for key, node in objects(plain):
        _check_arguments(key, node)
        check_kinds(key, node)
    _check_plain_kinds(cfg)
    check_ranges(plain)
    for group in ("callbacks", "logger"):
        for name, node in (cfg[group] or {}).items():
            if "_target_" not in node:
                raise UserError(
                    f"{group}.{name}: the recipe sets options of it, but {group}=... does not bring it; "
                    f"choose the recipe's own {group}, or leave one out by ~{group}.{name}"
                )
    check_root(cfg)
    check_start(cfg)
    check_scores(cfg)
    check_files(cfg)
    check_sizes(cfg)
    check_token_io(cfg)
    _check_text(cfg)
    check_taps(cfg)


def _check_arguments(key: str, node: Mapping[str, Any]) -> None:
    names = arguments_of(node["_target_"], f"{key}._target_")
    for name in node if names is not None else ():
        if str(name).startswith("_") or name in names:
            continue
        owner = str(node["_target_"]).rpartition(".")[2]
        raise UserError(
            f"{key}.{name}: {owner} has no such option.{nearest(str(name), names)} Valid: {', '.join(names)}."
        )


# Options of the house itself, which no object declares.
_OWN_KINDS = {"steps": int, "seed": int, "ema.decay": float, "ema.warmup": bool}
_OWN_TEXTS = ("name", "run_name", "run_dir", "resume")
# Names that Lightning looks up in registries, so that no source lists them.
_REGISTERED = {
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.strategy": (
        "auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "ddp_spawn", "ddp_fork",
        "ddp_notebook", "fsdp", "fsdp_cpu_offload", "deepspeed", "single_device",
    ),
}  # fmt: skip


def _check_plain_kinds(cfg: DictConfig) -> None:
    """Options that stand beside the objects."""
    for key, expected in {**_OWN_KINDS, **dict.fromkeys(_OWN_TEXTS, str)}.items():
        value = OmegaConf.select(cfg, key)
        if type(value) is not expected and not (expected is float and type(value) is int):
            if not (key in ("name", "run_name") and type(value) is int):  # run_name=3 is a name
                raise UserError(f"{key}: expected {WORDS[expected]}, found {value!r}")
    for key, choices in _REGISTERED.items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and value not in choices:
            raise unknown_choice(key, value, choices)


def _check_text(cfg: DictConfig) -> None:
    targets = {part: str(cfg[part]._target_) for part in ("conditioner", "backbone")}
    names = {part: arguments_of(target, f"{part}._target_") or () for part, target in targets.items()}
    conditioner, backbone = (target.rpartition(".")[2] for target in targets.values())
    takes = ("context_dim" in names["backbone"], "num_classes" in names["backbone"])
    check_text(conditioner, "text_encoders" in names["conditioner"], backbone, takes)


def check_references(cfg: DictConfig) -> None:
    """Every key that another one is read from exists: a part may count on an option of another (``backbone.branches``).

    Raises:
        UserError: naming the two parts.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    for key, value in texts(plain):
        for group, option in re.findall(r"\$\{([a-z_]\w*)\.(\w+)", value):
            node = plain.get(group)
            if isinstance(node, dict) and "_target_" in node and option not in node:
                owner = str(node["_target_"]).rpartition(".")[2]
                raise UserError(
                    f"{key} and {group} do not go together: {key} is read from '{group}.{option}', which {owner} does "
                    f"not have; choose another {group}, or another {key.split('.')[0]}"
                )


def check_root(cfg: DictConfig) -> None:
    """The folder, file or URL of the data is named; a folder or file is there. A URL is opened by whoever reads it.

    Raises:
        UserError: naming the key and, where the recipe reads one, the environment variable.
    """
    if "root" not in cfg.data or cfg.task.name == "plan":  # which needs no pictures
        return
    raw = str(OmegaConf.to_container(cfg.data, resolve=False)["root"])  # type: ignore[index, call-overload]
    variable = re.search(r"oc\.env:(\w+)", raw)
    mend = "set data.root=FOLDER" + (f" or the environment variable {variable[1]}" if variable else "")
    if cfg.data.root is None:
        raise UserError(f"data.root: has no value; {mend}")
    if "://" not in str(cfg.data.root) and not Path(cfg.data.root).expanduser().exists():
        raise UserError(f"data.root: no folder '{cfg.data.root}'; {mend}")


def check_start(cfg: DictConfig) -> None:
    """The weights that a training begins with are there.

    Raises:
        UserError: naming the key.
    """
    if cfg.task.name != "train":
        return  # other tasks read the weights of the run
    for key in ("init_from", "tuning.weights"):
        raw, value = _raw(cfg, key), OmegaConf.select(cfg, key)
        if raw is None or value == "random":
            continue
        if value is None:
            raise UserError(
                f"{key}: this recipe begins with given weights; set {key}=FILE or the environment variable "
                "REPALIGN_BASE (a .safetensors of task=convert), or random for fresh ones"
            )
        if not Path(str(value)).expanduser().exists():  # shards of a checkpoint are a folder
            raise UserError(f"{key}: no file '{value}'; give a .safetensors of task=convert, or a .ckpt of a run")


def _raw(cfg: DictConfig, key: str) -> Any:
    """A value as written, interpolations unresolved; None where there is no such key."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def check_token_io(cfg: DictConfig) -> None:
    """A backbone that takes no token io has the latent alone, in patches.

    Raises:
        UserError: naming the backbone, and the token io or the streams that it cannot have.
    """
    chosen = str(cfg.token_io._target_).rpartition(".")[2]
    if "token_io" in cfg.backbone or (chosen == "PatchIO" and not cfg.streams):
        return
    found = f"token_io ({chosen})" if chosen != "PatchIO" else f"streams ({', '.join(map(str, cfg.streams))})"
    raise UserError(
        f"{found} and backbone ({str(cfg.backbone._target_).rpartition('.')[2]}) do not go together: this backbone "
        "cuts one latent into patches itself; set token_io=patch streams=none, or backbone=sit_*"
    )


def check_taps(cfg: DictConfig) -> None:
    """Every aligner's tap exists in the backbone.

    Asked of a twin of the same depth that is as narrow as its heads allow: the real one may not fit into this machine's
    memory, and the first tensor on the meta device costs four seconds of imports.

    Raises:
        UserError: naming the aligner, the tap and the nearest one.
    """
    if not cfg.aligners:
        return
    narrow = cfg.backbone.copy()
    if "groups" in narrow:
        narrow.groups = 1  # of a U-Net's norms: they divide every width
    if narrow.get("head_dim"):
        narrow.dim = narrow.head_dim
    elif "heads" in narrow and "dim" in narrow:
        narrow.dim = 12 * (narrow.heads or narrow.depth)  # a multiple of 4, and of 3 where sizes are embedded
    with open_dict(narrow):
        narrow.pop("token_io", None)  # taps have the same names whatever the streams are
    side = 4 * narrow.patch if "patch" in narrow else 64
    sizes = {"num_classes": 1, "context_dim": 4, "pooled_dim": 4}
    names = arguments_of(narrow["_target_"], "backbone._target_") or ("num_classes",)
    backbone = build(narrow, "backbone")(latent_shape=(4, side, side), **{k: n for k, n in sizes.items() if k in names})
    for name, aligner in cfg.aligners.items():
        for key, tap in (
            (f"aligners.{name}.tap", aligner.tap),
            (f"aligners.{name}.target.tap", aligner.target.get("tap")),
        ):
            if tap is not None and tap not in backbone.tap_specs:
                raise unknown_choice(key, tap, backbone.tap_specs, "tap of this backbone")
