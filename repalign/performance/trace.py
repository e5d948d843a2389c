"""A training step on the meta device: every operation and every allocation is counted, none is done."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# What autocast computes in the lower precision, and in float32 (PyTorch's lists for CUDA, as far as steps use them).
_LOWER = {F.linear, F.conv2d, F.conv_transpose2d, torch.matmul, torch.bmm, torch.addmm, torch.einsum, torch.mm,
          Tensor.matmul, Tensor.__matmul__}  # fmt: skip
_FULL = {F.layer_norm, F.group_norm, F.softmax, F.mse_loss, F.cosine_similarity, F.normalize, F.softplus,
         torch.softmax, torch.exp, torch.log, torch.pow, Tensor.exp, Tensor.log, Tensor.pow}  # fmt: skip


@contextmanager
def weightless() -> Iterator[None]:
    """Modules built inside have parameters with a shape and no memory; what is computed from values still is."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        held = module._parameters[name]
        if held is not None and held.device.type != "meta":
            module._parameters[name] = nn.Parameter(held.to("meta"), held.requires_grad)

    nn.Module.register_parameter = on_meta  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class Allocations(TorchDispatchMode):
    """Bytes that tensors made inside take, now and at most; a storage counts from its making to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device.type == "meta":
                self._add(made.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """What a fused attention computes and keeps: queries, keys, values, result, a number per row; no N x N matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _compute(q, 2 * math.prod(q.shape) * k.shape[-2])  # q k^T and its product with v
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        _compute(q, 5 * math.prod(q.shape) * k.shape[-2])  # q k^T once more, and two products for each of the two
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _compute(like: Tensor, products: int) -> None:
    """So many multiplications and additions, without memory: a long inner product of one number with itself."""
    one = like.new_empty(1, 1, 1)
    torch.bmm(one.expand(1, 1, products), one.expand(1, products, 1))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(q, k, v)  # pyright: ignore[reportReturnType]


class _Autocast(TorchFunctionMode):
    """Autocast for a device that has none: weights are cast once, as autocast caches them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOWER and torch.is_autocast_enabled("cpu"):
            args, kwargs = self._cast(args), {k: self._cast((v,))[0] for k, v in kwargs.items()}
        elif func in _FULL:
            args = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        return func(*args, **kwargs)

    def _cast(self, values: Any) -> tuple[Any, ...]:
        return tuple(self._lowered(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in values)

    def _lowered(self, x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            return x.to(self.dtype)
        if id(x) not in self._weights:
            self._weights[id(x)] = x.to(self.dtype)
        return self._weights[id(x)]


_casting: list[_Autocast] = []


@contextmanager
def pretended(precision: str) -> Iterator[None]:
    """Fused attention, and autocast where the precision is mixed, on the meta device."""
    fused, autocast = F.scaled_dot_product_attention, torch.autocast

    def switch(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    F.scaled_dot_product_attention, torch.autocast = _attention, switch
    try:
        with ExitStack() as stack:
            if "mixed" in precision:
                dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
                stack.enter_context(autocast("cpu", torch.bfloat16))  # networks turn it off by this switch
                _casting.append(stack.enter_context(_Autocast(dtype)))
                stack.callback(_casting.clear)
            yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = fused, autocast


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """Checkpoint blocks as :func:`repalign.training.policies.recompute` does, inside what :func:`pretended` sets."""
    for block in blocks:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # The backward pass leaves the modes of the forward pass; a recomputation needs them again.
        modes = (nullcontext(), _casting[-1] if _casting else nullcontext())
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: modes, **kwargs
        )

    return call
