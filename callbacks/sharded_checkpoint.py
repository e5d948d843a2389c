"""Checkpoints of sharded training: a folder of safetensors that every process writes its part of.

``step_00001000.ckpt/`` holds ``shard-<rank>-....safetensors`` (weights, averages and moments of the optimizers, by
torch.distributed.checkpoint) and ``rest.pt`` (everything else: plain values, read with weights_only), each with its
SHA-256 beside it. No pickle is read. The folder gets its name when all of it is on the disk.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.tensor import DTensor, distribute_tensor

from repalign.folders import to_disk
from repalign.reading import read_torch
from repalign.seals import remove_sealed, seal, write_sealed

REST = "rest.pt"
MODEL, OPTIMIZER = "state_dict", "optimizer"


class _SealedShards(HuggingFaceStorageWriter):
    """Leaves a SHA-256 beside each file that this process has written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        written = super().write_data(plan, planner)
        written.wait()
        for file in Path(self.path).glob(f"shard-{plan.storage_data['shard_index']:05d}-*.safetensors"):
            seal(file)
        return written


class ShardedWriter:
    """Writes one checkpoint at a time in the background, from a copy that is made before :meth:`begin` returns.

    Processes agree over a gloo group of their own, so that nothing of training waits in between.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._pending: Future[None] | None = None

    def begin(self, tensors: Mapping[str, Tensor], rest: dict[str, Any], target: Path) -> None:
        """Copy the state and start to write it; waits for the checkpoint before."""
        self.finish()
        folder = target.with_name(f".{target.name}.incomplete")
        if dist.get_rank() == 0:
            for left in (*target.parent.glob(".step_*.incomplete"), *target.parent.glob(".step_*.removed")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()  # of a run that was killed
            folder.mkdir(parents=True)
            write_sealed(folder / REST, lambda file: torch.save(rest, file))
        dist.barrier(self._group)
        staged = {name: _copied(value) for name, value in tensors.items()}
        writer = _SealedShards(str(folder), save_distributed=True)
        written = dcp.async_save(staged, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
        self._pending = Future()
        written.add_done_callback(partial(_complete, self._pending, folder, target if dist.get_rank() == 0 else None))

    def finish(self) -> None:
        """Wait for the checkpoint under way.

        Raises:
            OSError: when it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        dist.barrier(self._group)  # the first process has given it its name


def _complete(pending: Future[None], folder: Path, target: Path | None, written: Future[Any]) -> None:
    """The coordinator's future ends when every process has written and flushed its part: then the folder gets its name.

    Processes that are no coordinator have no target.
    """
    try:
        written.result()
        if target is not None:
            _rename(folder, target)
    except BaseException as error:
        failed = OSError(f"checkpoint '{folder}' could not be written: {type(error).__name__}: {error}")
        pending.set_exception(failed)
    else:
        pending.set_result(None)


def _copied(value: Tensor) -> Tensor:
    """A copy on the host with the same sharding."""
    if not isinstance(value, DTensor):
        return value.detach().to("cpu", copy=True)
    local = value.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def _rename(written: Path, target: Path) -> None:
    to_disk(written)
    if target.is_dir():
        remove(target)
    os.rename(written, target)
    to_disk(target.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: a file and its seal, or a folder, which loses its name first: no half of it is ever read."""
    if checkpoint.is_dir():
        hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
        os.rename(checkpoint, hidden)
        shutil.rmtree(hidden)
    else:
        remove_sealed(checkpoint)


def flat_state(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[dict[str, Tensor], list[Any]]:
    """Every tensor of model and optimizers by name, and the groups of the optimizers as plain values."""
    tensors = {f"{MODEL}.{name}": value for name, value in module.state_dict().items()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    described = []
    for number, optimizer in enumerate(optimizers):
        groups = []
        for group in optimizer.param_groups:
            own = [names[id(parameter)] for parameter in group["params"]]
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": own})
            for name, parameter in zip(own, group["params"], strict=True):
                for key, value in optimizer.state[parameter].items():
                    tensors[f"{OPTIMIZER}.{number}.{name}.{key}"] = torch.as_tensor(value)
        described.append(groups)
    return tensors, described


def read_rest(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides its tensors; no code from the file is run."""
    return read_torch(folder / REST)


def sizes_in(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and type of every tensor in a sharded checkpoint, by name."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def shapes_in(folder: Path) -> dict[str, torch.Size]:
    """Shape of every weight in a sharded checkpoint, by name."""
    found = {name: entry.size for name, entry in sizes_in(folder).items() if name.startswith(f"{MODEL}.")}
    return {name.removeprefix(f"{MODEL}."): size for name, size in found.items()}


def read_whole(folder: Path, optimizers: bool = True) -> dict[str, Any]:
    """A sharded checkpoint as an ordinary one, in this process: weights by name, moments by place.

    Args:
        folder: of any number of processes.
        optimizers: whether their moments are read.
    """
    rest = read_rest(folder)
    groups = rest.pop("optimizer_groups")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes_in(folder).items()
        if optimizers or name.startswith(f"{MODEL}.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    rest["state_dict"] = {n.removeprefix(f"{MODEL}."): x for n, x in tensors.items() if n.startswith(f"{MODEL}.")}
    if optimizers:
        rest["optimizer_states"] = [_by_place(number, group, tensors) for number, group in enumerate(groups)]
    return rest


def _by_place(number: int, groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    places = {name: place for place, name in enumerate(name for group in groups for name in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    prefix = f"{OPTIMIZER}.{number}."
    for full, value in tensors.items():
        if full.startswith(prefix):
            name, _, key = full.removeprefix(prefix).rpartition(".")
            state.setdefault(places[name], {})[key] = value
    numbered = [{**group, "params": [places[name] for name in group["params"]]} for group in groups]
    return {"state": state, "param_groups": numbered}


def load_sharded(module: nn.Module, optimizers: list[torch.optim.Optimizer], folder: Path) -> dict[str, Any]:
    """Fill sharded model and optimizers from a sharded checkpoint of any number of processes; returns the rest."""
    rest = read_rest(folder)
    groups, sizes = rest.pop("optimizer_groups"), sizes_in(folder)
    tensors: dict[str, Any] = {f"{MODEL}.{name}": value for name, value in module.state_dict().items()}
    parameters = dict(module.named_parameters())
    for number, optimizer in enumerate(optimizers):
        _take_groups(optimizer, groups[number])
        prefix = f"{OPTIMIZER}.{number}."
        for full, entry in sizes.items():
            if full.startswith(prefix):
                name, _, key = full.removeprefix(prefix).rpartition(".")
                value = _room(parameters[name], entry)
                optimizer.state[parameters[name]][key] = value
                tensors[full] = value
    with torch.no_grad():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    return rest


def load_whole(module: nn.Module, optimizers: list[torch.optim.Optimizer], content: dict[str, Any]) -> dict[str, Any]:
    """Fill sharded model and optimizers from an ordinary checkpoint; returns the rest."""
    own = module.state_dict()
    with torch.no_grad():
        for name, value in content.pop("state_dict").items():
            own[name].copy_(_like(value, own[name]))
    for optimizer, saved in zip(optimizers, content.pop("optimizer_states"), strict=True):
        _take_groups(optimizer, saved["param_groups"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for place, state in saved["state"].items():
            for key, value in state.items():
                like = parameters[place] if value.shape == parameters[place].shape else value
                optimizer.state[parameters[place]][key] = _like(value, like)
    return content


def _take_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})


def _room(parameter: Tensor, entry: TensorStorageMetadata) -> Tensor:
    dtype = entry.properties.dtype
    if entry.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(entry.size, dtype=dtype, device="cpu" if not entry.size else parameter.device)


def _like(value: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
