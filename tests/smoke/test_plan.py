"""task=plan: a step that is only traced has the operations and the memory of the real one."""

import ctypes
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repalign.errors import UserError
from repalign.performance.memory import PeakMemory
from repalign.performance.peaks import GPUS
from repalign.performance.plan import Footprint, exchange_seconds, memory, predict
from tasks import plan
from tasks.build import assemble
from tasks.check import check_composition
from tasks.launch import compose

WITHOUT_FILES = ("data=synthetic", "data.image_size=256", "autoencoder.weights=random", "encoders.main.weights=random")
SHALLOW = {
    "repa_sit_s": ("backbone.depth=3", "align.tap=block.2"),
    "ddt_b": ("backbone.dim=384", "backbone.heads=6"),
}


def composed(tmp_path: Path, *words: str):
    cfg = compose(["task=plan", f"paths.runs={tmp_path}", "run_name=run", *words])
    check_composition(cfg)
    return cfg


def return_what_is_freed() -> None:
    """glibc otherwise keeps freed memory, and a step takes it without growing."""
    assert ctypes.CDLL(None).mallopt(-3, 2**16) == 1  # M_MMAP_THRESHOLD


def real_step(cfg, batch: int) -> tuple[float, int, int]:
    """Operations, and bytes on top of the weights, of a step that is taken; and the number of trained parameters."""
    data_words = plan.made_up  # the same batch, with memory
    module = assemble(cfg).module
    module.note = lambda *_: None
    module.planned_size = cfg.data.image_size
    given = data_words(module, [], batch)
    given = {k: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with FlopCounterMode(display=False) as counter:
        module.training_step(given, 0).backward()
    module.zero_grad()
    module.training_step(given, 0).backward()  # buffers of kernels that stay
    module.zero_grad()
    taken = PeakMemory(torch.device("cpu"))
    module.training_step(given, 0).backward()
    return (
        counter.get_total_flops() / batch,
        taken.read() - taken.before,
        sum(p.numel() for p in module.learned() if p.requires_grad),
    )


@pytest.mark.parametrize("recipe", ["sit_s", "repa_sit_s", "sra_sit_b", "ddt_b", "sd3_d24", "redi_sit_b"])
def test_traced_operations_are_those_of_the_real_step(recipe, tmp_path):
    cfg = composed(tmp_path, f"experiment={recipe}", "debug=tiny")
    traced, _ = plan.footprint(cfg, "32-true", [])
    flops, _, parameters = real_step(cfg, 4)
    assert traced.trained_flops == pytest.approx(flops, rel=0.02)
    assert parameters == traced.parameters


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is told to return what is freed")
@pytest.mark.parametrize(("recipe", "batch"), [("repa_sit_s", 8), ("repa_sit_s", 24), ("ddt_b", 4)])
def test_traced_memory_is_that_of_the_real_step(recipe, batch, tmp_path):
    """Within 10 %, of networks at width 384: activations and the gradients."""
    cfg = composed(tmp_path, f"experiment={recipe}", *SHALLOW[recipe], *WITHOUT_FILES)
    traced, _ = plan.footprint(cfg, "32-true", [])
    with ProcessPoolExecutor(1, get_context("spawn"), return_what_is_freed) as fresh:
        _, measured, _ = fresh.submit(real_step, cfg, batch).result()
    planned = max(traced.fixed + batch * traced.per_image, traced.least)
    print(f"| `{recipe}` | {batch} | {planned / 2**20:.0f} | {measured / 2**20:.0f} | {measured / planned - 1:+.1%} |")
    assert measured == pytest.approx(planned, rel=0.1)


def test_xl_in_seconds_on_paper(tmp_path):
    cfg = composed(tmp_path, "experiment=sit_xl", "task.gpus=[1,8,512]")
    plan.run(cfg)
    content = json.loads((Path(cfg.run_dir) / "plan.json").read_text())
    print_ = content["footprint"]
    assert print_["parameters"] == pytest.approx(675e6, rel=0.01)  # arXiv:2401.08740, table 1
    assert print_["trained_flops"] == pytest.approx(0.712e12, rel=0.03)  # 3 x 2 x 118.6 GMAC
    assert print_["recomputed"] < print_["per_image"] / 4
    assert content["bytes_per_picture"] == {"latents": 2 * 4 * 4 * 32 * 32}
    rows = {(row["gpus"], row["strategy"], row["activations"]): row for row in content["rows"]}
    assert rows[8, "FSDP", "kept"]["memory"] < rows[8, "DDP", "kept"]["memory"]
    assert rows[1, "DDP", "recomputed"]["seconds"] > rows[1, "DDP", "kept"]["seconds"]
    assert not any(gpus == 512 for gpus, _, _ in rows)  # 256 pictures a step


def test_live_networks_and_stores(tmp_path):
    cfg = composed(tmp_path, "experiment=repa_sit_s")
    stored, sizes = plan.footprint(cfg, "bf16-mixed", [])
    live, _ = plan.footprint(cfg, "bf16-mixed", ["encoder"])
    assert stored.frozen_flops == 0 and live.frozen_flops == pytest.approx(46e9, rel=0.05)  # DINOv2-B at 257 tokens
    assert live.trained_flops == pytest.approx(stored.trained_flops)
    assert sizes == {"latents": 32768, "features_main": 256 * 768 * 2}


def test_the_models_arithmetic():
    print_ = Footprint(10**9, 10**9, 0, 1e12, 0, 2**20, 1e9, 5e9)
    assert memory(print_, 0) == 21e9 and memory(print_, 0, 8) == 20e9 / 8 + 1e9
    assert memory(print_, 10**4) == 17e9 + 10**4 * 2**20
    assert exchange_seconds(10**9, 1, 450, 50) == 0
    assert exchange_seconds(10**9, 8, 450, 50) == pytest.approx(7e9 / 450e9)
    one, many = (predict(print_, GPUS["h100"], n, 256, mfu=0.5, arithmetic="bfloat16") for n in (1, 64))
    assert one.compute == pytest.approx(256e12 / (0.5 * 989e12))
    assert many.images_per_second < 64 * one.images_per_second


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.gpu=h20", "task.gpu: unknown GPU 'h20'"),
        ("task.mfu=1.5", "task.mfu: expected a share"),
        ("task.live=[vae]", "task.live: unknown network 'vae'"),
    ],
)
def test_what_is_wrong_is_said_first(word, message, tmp_path):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        plan.run(composed(tmp_path, "experiment=sit_s", word))
