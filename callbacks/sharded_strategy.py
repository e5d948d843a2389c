"""FSDP2 under Lightning: parameters, averages and optimizer state sharded over all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from callbacks.sharded_checkpoint import ShardedWriter, flat_state, load_sharded, load_whole, shapes_in
from repalign.errors import UserError
from repalign.reading import read_torch


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` over one axis of data, with checkpoints of this house.

    What is sharded is the module's business (``configure_model``). Differs from the base class in the checkpoint: it is
    written in the background from a copy, has its name only when it is whole, holds no pickle, and is read by any
    number of processes; ordinary checkpoints are read too.

    Args:
        write_behind: go on training while a checkpoint is written.
    """

    def __init__(self, write_behind: bool = True) -> None:
        super().__init__(tensor_parallel_size=1)
        self.write_behind = write_behind
        self._writer: ShardedWriter | None = None

    def setup_environment(self) -> None:
        """The axis of data has all processes.

        Raises:
            UserError: for a training in phases.
        """
        module = self.lightning_module
        if module is not None and not module.automatic_optimization:
            raise UserError(
                f"trainer=fsdp: {type(module).__name__} trains in phases that freeze and free parts in turn, which "
                "sharded parts do not follow; set trainer=ddp"
            )
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards stay where they are until :meth:`save_checkpoint` copies them."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See :meth:`lightning_module_state_dict`."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Copy the state, then write it; every process calls this."""
        assert self.lightning_module is not None
        if self._writer is None:
            self._writer = ShardedWriter()
        tensors, groups = flat_state(self.lightning_module, list(self.optimizers))
        rest = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        self._writer.begin(tensors, {**rest, "optimizer_groups": groups}, Path(self.broadcast(str(filepath))))
        if not self.write_behind:
            self._writer.finish()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizers from a sharded or an ordinary checkpoint; no code from a file is run."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        if path.is_dir():
            self.lightning_module.check_architecture(shapes_in(path))
            return load_sharded(self.lightning_module, list(self.optimizers), path)
        content = read_torch(path)
        self.lightning_module.check_architecture({name: x.shape for name, x in content["state_dict"].items()})
        return load_whole(self.lightning_module, list(self.optimizers), content)

    def teardown(self) -> None:
        """However a run ends, a checkpoint that was begun is finished."""
        self.finish_writing()
        super().teardown()

    def finish_writing(self) -> None:
        """Wait for the checkpoint under way."""
        if self._writer is not None:
            self._writer.finish()

    def reduce(self, tensor: Tensor | Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As the base class, of a copy: it reduces in place."""
        return super().reduce(tensor.clone() if isinstance(tensor, Tensor) else tensor, group, reduce_op)
