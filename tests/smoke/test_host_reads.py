"""Between two looks no step waits for its device: nothing is read back, no constant is made on the host."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.base import RunModule
from tests.smoke.test_recipes_train import train

ROOT = str(Path(__file__).parents[2])
# Operations whose result, or its shape, the host must wait for.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.bincount.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
READS = ("tolist", "numpy", "cpu", "__array__")
MAKERS = ("tensor", "as_tensor", "asarray")


class HostReads(TorchDispatchMode):
    """Notes every read of a tensor that would lie on the device, and every constant made on the host.

    On a CPU all tensors are on the host; those that stay there in training too (serial numbers) are named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.host: set[int] = set()
        self._undo: list[Callable[[], Any]] = []

    def keeps(self, tensor: torch.Tensor) -> None:
        """This tensor and its views lie on the host."""
        self.host.add(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        boolean = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (func in WAITING or boolean) and args[0].untyped_storage().data_ptr() not in self.host:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        ours = [f for f in traceback.extract_stack()[:-2] if f.filename.startswith(ROOT) and ".venv" not in f.filename]
        last = next((f for f in reversed(ours) if "/tests/" not in f.filename), ours[-1])
        self.found.append(f"{what} from {last.filename.removeprefix(ROOT)}:{last.lineno} ({last.line})")

    def __enter__(self):
        for name in READS:
            self._patch(torch.Tensor, name, lambda tensor, *_, **__: tensor.untyped_storage().data_ptr() in self.host)
        for name in MAKERS:  # by whom, if not by PyTorch or Lightning themselves
            self._patch(torch, name, lambda *_, **__: not _caller().startswith(ROOT) or ".venv" in _caller())
        return super().__enter__()

    def __exit__(self, *exc):
        while self._undo:
            self._undo.pop()()
        return super().__exit__(*exc)

    def _patch(self, owner: Any, name: str, allowed: Callable[..., bool]) -> None:
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not allowed(*args, **kwargs):
                self.note(name)
            return whole(*args, **kwargs)

        setattr(owner, name, call)
        self._undo.append(lambda: setattr(owner, name, whole))


def _caller() -> str:
    return traceback.extract_stack(limit=4)[0].filename


class Detector(pl.Callback):
    """Listens from batch to batch, over steps in which no callback has a look due."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.steps = 0
        self.found: list[str] = []
        self._reads: HostReads | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.first <= pl_module.progress.step + 1 <= self.last:
            self._reads = HostReads()
            self._reads.keeps(batch["serial"])
            self._reads.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self._reads is not None:
            self._reads.__exit__(None, None, None)
            self.found += self._reads.found
            self.steps += 1
            self._reads = None


def steps_of(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: pl.Callback, *words: str) -> None:
    # What a module brings stands behind the trainer's own callbacks: theirs are listened to as well.
    monkeypatch.setattr(RunModule, "configure_callbacks", lambda self: [detector])
    quiet = ("journal", "guard")
    train(
        tmp_path,
        f"experiment={recipe}",
        "steps=6",
        *(f"callbacks.{name}.every=100" for name in quiet),
        "~callbacks.sample_grid",
        *words,
    )


RECIPES = ["sit_s", "repa_sit_s", "repa_e_sit_s", "sra_sit_b", "repa_sd3_d24"]
LIVE = ("data.cache_latents=false", "data.cache_features=false")


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_its_device(recipe, tmp_path, monkeypatch):
    detector = Detector(3, 5)
    monkeypatch.setattr("tests.smoke.test_recipes_train.compose", _with_quiet_journal())
    steps_of(recipe, tmp_path, monkeypatch, detector, *(LIVE if recipe == "repa_sit_s" else ()))
    assert detector.steps == 3
    assert not detector.found, "\n".join(sorted(set(detector.found)))


def _with_quiet_journal():
    from tasks.launch import compose

    def composed(words):  # the helper writes every step; here the last word wins
        return compose([word for word in words if word != "callbacks.journal.every=1"])

    return composed


def test_the_detector_hears_every_kind_of_read():
    x = torch.arange(4.0)
    host = torch.arange(4)
    for read in (
        lambda: x[0].item(),
        lambda: bool(x.sum() > 0),
        lambda: float(x[1]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0]),
    ):
        with HostReads() as reads:
            reads.keeps(host)
            read()
            assert reads.found, traceback.format_stack()
    with HostReads() as reads:
        reads.keeps(host)
        host.tolist(), int(host[1]), x * 2, torch.where(x > 1, x, 0), x.sum()
    assert not reads.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_a_gpu(recipe, tmp_path, monkeypatch):
    class Sync(pl.Callback):
        """PyTorch itself refuses to wait."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if 3 <= pl_module.progress.step + 1 <= 5:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("tests.smoke.test_recipes_train.compose", _with_quiet_journal())
    steps_of(recipe, tmp_path, monkeypatch, Sync(), "trainer.accelerator=gpu")
