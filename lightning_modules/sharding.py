"""Sharding of trained parts and their average over processes (FSDP2: parameters become DTensors)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from repalign.errors import UserError
from repalign.protocols import Backbone
from repalign.state import Output, Streams, Tokens
from repalign.training.policies import units_of


def shard_parts(parts: nn.ModuleDict, mesh: DeviceMesh) -> None:
    """Shard backbone and heads in place: each block, then what is left of the network, then each head.

    Everything is resharded after a forward pass, because the average, previews and checkpoints read the parameters
    between steps: whole ones that a forward pass left behind would be stale there.

    Args:
        parts: ``backbone``, ``aligners`` and perhaps a norm, whose statistics are no parameters and stay whole.
        mesh: one-dimensional.
    """
    _show_outputs()
    backbone: Any = parts["backbone"]
    for unit in units_of(backbone):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    heads = parts["aligners"]
    assert isinstance(heads, nn.ModuleDict)
    for part in (backbone, *heads.values()):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def check_shardable(backbone: Backbone, beside: dict[str, Any]) -> None:
    """What is optimised is sharded.

    Raises:
        UserError: for weights outside backbone and heads.
    """
    units_of(backbone)
    for name, part in beside.items():
        if isinstance(part, nn.Module) and any(weight.requires_grad for weight in part.parameters()):
            raise UserError(
                f"trainer=fsdp shards the backbone and the heads of aligners; {name}={type(part).__name__} has weights "
                "of its own: set trainer=ddp"
            )


def whole(value: Tensor) -> Tensor:
    """A number that every process has: of a DTensor the reduced one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _show_outputs() -> None:
    """Let FSDP find the tensors in what a backbone returns: it gathers weights for the backward pass by hooks there."""
    for kind in (Output, Tokens, Streams):
        if kind not in pytree.SUPPORTED_NODES:
            pytree.register_pytree_node(
                kind,
                lambda x: (list(vars(x).values()), list(vars(x))),
                lambda values, names, kind=kind: _rebuilt(kind, names, values),
                serialized_type_name=f"repalign.{kind.__name__}",
            )


def _rebuilt(kind: type, names: Any, values: Any) -> Any:
    found = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(found, name, value)
    return found
