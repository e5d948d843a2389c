"""Checks of a composed configuration that need no object: keys, types, missing values, targets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, nearest, unknown_choice
from tasks.instantiate import build, check_targets, objects
from tasks.signatures import arguments_of

# The surface of the house: a recipe that writes another top-level key has misspelt one of these.
TOP_LEVEL = frozenset(
    "task paths data autoencoder encoders text_encoders streams pca backbone token_io tuning clock path "
    "parametrization time_sampler objective conditioner aligners optimizer sampler guidance metric method trainer "
    "callbacks logger name run_name run_dir resume seed steps compile ema align score overrides reference".split()
)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a mapping"}


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
        if before is None or after is None:
            continue
        expected, found = _kind(before), _kind(after)
        if expected != found and not (expected is float and found is int):
            raise UserError(f"{key}: expected {_WORDS[expected]} like {before!r}, found {after!r}")


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
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: has no value yet; set {missing[0]}=...")
    check_targets(cfg)
    for key, node in objects(OmegaConf.to_container(cfg, resolve=False)):
        _check_arguments(key, node)
    for group in ("callbacks", "logger"):
        for name, node in (cfg[group] or {}).items():
            if "_target_" not in node:
                raise UserError(
                    f"{group}.{name}: the recipe sets options of it, but {group}=... does not bring it; "
                    f"choose the recipe's own {group}, or leave one out by ~{group}.{name}"
                )
    check_root(cfg)
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


def check_root(cfg: DictConfig) -> None:
    """The folder, file or URL of the data is named; a folder or file is there. A URL is opened by whoever reads it.

    Raises:
        UserError: naming the key and, where the recipe reads one, the environment variable.
    """
    if "root" not in cfg.data:
        return
    raw = str(OmegaConf.to_container(cfg.data, resolve=False)["root"])  # type: ignore[index, call-overload]
    variable = re.search(r"oc\.env:(\w+)", raw)
    mend = "set data.root=FOLDER" + (f" or the environment variable {variable[1]}" if variable else "")
    if cfg.data.root is None:
        raise UserError(f"data.root: has no value; {mend}")
    if "://" not in str(cfg.data.root) and not Path(cfg.data.root).expanduser().exists():
        raise UserError(f"data.root: no folder '{cfg.data.root}'; {mend}")


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
    if "heads" in narrow and "dim" in narrow:
        narrow.dim = 4 * narrow.heads
    with open_dict(narrow):
        narrow.pop("token_io", None)  # taps have the same names whatever the streams are
    side = 4 * narrow.patch if "patch" in narrow else 64
    backbone = build(narrow, "backbone")(latent_shape=(4, side, side), num_classes=1)
    for name, aligner in cfg.aligners.items():
        for key, tap in (
            (f"aligners.{name}.tap", aligner.tap),
            (f"aligners.{name}.target.tap", aligner.target.get("tap")),
        ):
            if tap is not None and tap not in backbone.tap_specs:
                raise unknown_choice(key, tap, backbone.tap_specs, "tap of this backbone")
