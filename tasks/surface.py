"""The outside of a composed configuration: parts are there, interpolations resolve, files exist, sizes divide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, unknown_choice
from tasks.instantiate import CONF, objects

# The surface of the house: a recipe that writes another top-level key has misspelt one of these.
TOP_LEVEL = frozenset(
    "task paths data autoencoder encoders text_encoders streams pca backbone token_io tuning clock path "
    "parametrization time_sampler objective conditioner aligners optimizer sampler guidance metric method trainer "
    "callbacks logger protocol name run_name run_dir resume init_from seed steps compile ema align score overrides "
    "reference attention activations prompt_set".split()
)
# Top-level keys that are one object each.
PARTS = (
    "data autoencoder backbone token_io tuning clock path parametrization time_sampler objective conditioner optimizer "
    "sampler guidance metric method trainer pca attention activations compile".split()
)
# Top-level keys that are mappings, of objects by name or of plain options.
MAPPINGS = (
    "task",
    "paths",
    "encoders",
    "text_encoders",
    "streams",
    "aligners",
    "callbacks",
    "logger",
    "protocol",
    "ema",
    "align",
)
_EMPTY_TOO = ("callbacks", "logger", "encoders", "text_encoders", "streams", "aligners")
_FILES = ("weights", "folder", "path", "annotations", "file", "vgg16", "lpips", "reference", "checkpoint", "input")
_WORDS = ("hub", "random", "auto", "never", "standard")
_DRAWS_NOTHING = ("report", "plan", "ledger", "dashboard")  # tasks that read no part of the composition from a file


def check_structure(cfg: DictConfig) -> None:
    """Every part of a composition is there and is what it should be.

    Raises:
        UserError: naming the part.
    """
    for key in (*PARTS, *MAPPINGS):
        if key not in cfg:
            raise UserError(f"{key}: is missing; every composition has one: choose it by {key}=...")
        node = cfg._get_node(key)
        assert node is not None
        if node._is_interpolation() or (node._is_none() and key in _EMPTY_TOO):
            continue
        if not isinstance(node, DictConfig) or node._is_none():
            found = repr(node._value()) if not isinstance(node, ListConfig) else "a list"
            raise UserError(f"{key}: expected a mapping, found {found}; choose it by {key}=...")
        if key in PARTS and "_target_" not in node:
            raise UserError(f"{key}: has no _target_, so nothing can be built of it; choose it by {key}=...")
    for key in ("name", "run_name", "run_dir", "steps", "seed", "resume", "init_from", "score", "overrides"):
        if key not in cfg:
            raise UserError(f"{key}: is missing; set {key}=...")
    for key in ("name", "run_name"):
        text = str(OmegaConf.to_container(cfg, resolve=False)[key])  # type: ignore[index, call-overload]
        if ".." in Path(text).parts or Path(text).is_absolute():
            raise UserError(f"{key}: '{text}' leads out of paths.runs; give a name, or set run_dir")
    tasks = sorted(file.stem for file in (CONF / "task").glob("*.yaml"))
    if cfg.task.get("name") not in tasks:
        raise unknown_choice("task.name", str(cfg.task.get("name")), tasks, "task")


def check_interpolations(cfg: DictConfig) -> None:
    """Every interpolation resolves, but for those that only a run can (``hydra:``).

    Raises:
        UserError: naming the key, the interpolation and why not.
    """
    for key, node in _interpolated(cfg, ""):
        try:
            node._dereference_node()
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            if "HydraConfig" in reason:
                continue
            reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason)
            raise UserError(f"{key}: '{node._value()}' cannot be resolved ({reason})") from error


def _interpolated(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if node._is_interpolation():
        yield key, node
    elif isinstance(node, (DictConfig, ListConfig)) and not node._is_none() and not node._is_missing():
        names: Any = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            inner = node._get_node(name)
            place = f"{key}[{name}]" if isinstance(node, ListConfig) else f"{key}.{name}".lstrip(".")
            yield from _interpolated(inner, place)


def check_files(cfg: DictConfig) -> None:
    """Files and folders that options name are there.

    Raises:
        UserError: naming the option and the path.
    """
    if cfg.task.name in _DRAWS_NOTHING:
        return
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    places = [(key, node) for part in PARTS for key, node in objects(plain[part], part)]
    places += [place for group in ("encoders", "text_encoders", "callbacks") for place in objects(plain[group], group)]
    named = [f"{key}.{name}" for key, node in places for name in _FILES if isinstance(node.get(name), str)]
    named += [f"task.{name}" for name in ("checkpoint", "input") if isinstance(plain["task"].get(name), str)]
    named += ["resume"]
    for key in named:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, str) or value in _WORDS or "://" in value:
            continue
        if not Path(value).expanduser().exists():
            raise UserError(f"{key}: no file '{value}'; give the path of one that is there")


def check_sizes(cfg: DictConfig) -> None:
    """Widths divide by heads, pictures by the autoencoder's factor and the patch, where both are written.

    Raises:
        UserError: naming the two numbers.
    """
    backbone = cfg.backbone
    dim, heads = backbone.get("dim"), backbone.get("heads")
    if isinstance(dim, int) and isinstance(heads, int) and dim % heads:
        raise UserError(f"backbone.dim: {dim} is no multiple of backbone.heads {heads}")
    side, factor = cfg.data.get("image_size"), cfg.autoencoder.get("downsampling")
    if isinstance(side, int) and isinstance(factor, int):
        if side % factor:
            raise UserError(f"data.image_size: {side} is no multiple of autoencoder.downsampling {factor}")
        patch = backbone.get("patch")
        if isinstance(patch, int) and side // factor % patch:
            raise UserError(f"backbone.patch: {patch} does not divide the latent's side {side // factor}")


def check_text(conditioner: str, reads_text: bool, backbone: str, names: tuple[bool, bool]) -> None:
    """A conditioner that reads texts and a backbone that takes their states need each other.

    Args:
        conditioner: name of the conditioner.
        reads_text: whether it reads texts.
        backbone: name of the backbone.
        names: whether the backbone takes states of a text (``context_dim``), and whether it can do without
            (``num_classes``).

    Raises:
        UserError: naming both.
    """
    takes, without = names
    if reads_text and not takes:
        raise UserError(
            f"conditioner ({conditioner}) and backbone ({backbone}) do not go together: this backbone reads no text; "
            "set backbone=mmdit_d24 or so, or conditioner=label"
        )
    if not reads_text and takes and not without and conditioner == "LabelConditioner":
        raise UserError(
            f"conditioner ({conditioner}) and backbone ({backbone}) do not go together: this backbone needs texts; set "
            "conditioner=text text_encoder=..., or backbone=sit_*"
        )
