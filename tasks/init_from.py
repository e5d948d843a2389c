"""Beginning a training with the weights of another one: the next stage at a higher resolution, or a converted file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_modules.diffusion import DiffusionModule
from repalign.errors import UserError
from tasks.build import load_weights, read_checkpoint

# Fixed tables of positions belong to a resolution; heads of aligners to a stage.
_TABLE = "pos_embed"
_HEADS = (".aligners.",)


def init_from(module: DiffusionModule, path: str | Path) -> None:
    """Put the weights of a checkpoint into a module that has not trained yet: live into live, average into average.

    Kept are the module's own position tables, which follow the resolution, and heads of aligners that the checkpoint
    does not have; heads that the module does not have are left out. A .safetensors of task=convert has no average: its
    weights go into both, and its tables must fit.

    Raises:
        UserError: when the file is missing, torn, or of another architecture.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"init_from: no file '{file}'; give a .ckpt of a run folder or a .safetensors of task=convert")
    if file.suffix == ".safetensors":
        load_weights(module, file)
        return
    module.load_state_dict(_merged(module.state_dict(), read_checkpoint(file)))


def _merged(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {key: value for key, value in own.items() if _is_table(key) or (_is_head(key) and key not in found)}
    taken = {k: x for k, x in found.items() if not _is_table(k) and not (_is_head(k) and k not in own)}
    return {**taken, **kept}


def _is_table(key: str) -> bool:
    return key.rpartition(".")[2].startswith(_TABLE)


def _is_head(key: str) -> bool:
    return any(mark in key for mark in _HEADS)
