"""task=benchmark: the training's own step, split without a rest; stopwatch, peaks and memory."""

import json
from pathlib import Path

import pytest
import torch

from repalign.errors import UserError
from repalign.performance.memory import PeakMemory
from repalign.performance.peaks import GPUS, gpu_named, peak_of
from repalign.performance.spread import Spread
from repalign.performance.stopwatch import Stopwatch
from tasks import benchmark
from tasks.check import check_composition
from tasks.launch import compose


def measured(tmp_path: Path, *words: str) -> list[dict]:
    words = ("debug=tiny", "task=benchmark", "task.warmup=1", "task.steps=3", *words)
    cfg = compose([*words, f"paths.runs={tmp_path}", "run_name=run", f"paths.cache={tmp_path / 'cache'}"])
    cfg.overrides = [*words, f"paths.runs={tmp_path}", f"paths.cache={tmp_path / 'cache'}"]
    check_composition(cfg)
    benchmark.run(cfg)
    return json.loads((Path(cfg.run_dir) / "benchmark.json").read_text())


def test_regions_are_exclusive_and_sum_to_the_step():
    clock = iter(range(100))
    watch = Stopwatch(torch.device("cpu"), lambda: next(clock), lambda a, b: b - a)
    watch.begin("data")  # 0
    watch.base("other")  # 1
    with watch.region("optimizer"):  # 2
        with watch.region("forward"):  # 3 to 4
            pass
    watch.step()  # 6
    watch.base("data")  # 7
    watch.step()  # 8
    assert watch.read() == [{"data": 1, "other": 2, "optimizer": 2, "forward": 1}, {"other": 1, "data": 1}]


def test_a_table_of_recipes_with_the_operations_of_the_networks(tmp_path):
    recipes = "task.recipes=[repa_sit_s,sra_sit_b,repa_e_sit_s]"
    rows = measured(tmp_path, recipes, "data.cache_features=false", "data.cache_latents=false")
    assert [row["recipe"] for row in rows] == ["repa_sit_s", "sra_sit_b", "repa_e_sit_s"]
    for row in rows:
        assert row["steps"] == 3 and row["flops_per_step"] > 0 and 0 < row["mfu"] and row["peak_gib"] > 0
        regions = {name: spread["median"] for name, spread in row["split"].items()}
        assert {"data", "forward", "backward", "optimizer", "ema", "autoencoder"} <= regions.keys()
        assert min(regions[name] for name in ("forward", "backward", "optimizer", "ema")) > 0
        assert sum(regions.values()) == pytest.approx(row["seconds"]["median"], rel=0.5)
        assert row["images_per_second"]["p10"] <= row["images_per_second"]["median"]
    assert rows[0]["split"]["encoder"]["median"] > 0 and "encoder" not in rows[1]["split"]
    # Linear layers: twice the forward in the backward pass, but for the input of the first.
    assert 1.5 < rows[0]["flops"]["backward"] / rows[0]["flops"]["forward"] < 2.2
    assert "| repa_sit_s | 4 |" in next(tmp_path.rglob("benchmark.md")).read_text()


def test_stored_features_take_the_encoder_out_of_the_step(tmp_path):
    (row,) = measured(tmp_path, "experiment=repa_sit_s", "data.cache_features=true")
    assert "encoder" not in row["split"] and row["stored"] == ["features_main", "latents"]


def test_operations_do_not_depend_on_micro_batches(tmp_path):
    whole, split = (
        measured(tmp_path / str(n), "experiment=repa_sit_s", "data.cache_features=true", f"data.accumulate={n}")[0]
        for n in (1, 2)
    )
    assert split["flops_per_step"] == pytest.approx(whole["flops_per_step"], rel=1e-6)


def test_a_count_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="task.steps: expected 1 or more, found 0"):
        measured(tmp_path, "experiment=sit_s", "task.steps=0")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla K80", None),
        ("NVIDIA A10G", None),
    ],
)
def test_devices_are_known_by_their_drivers_names(name, key):
    assert gpu_named(name) == (None if key is None else GPUS[key])


def test_an_unknown_device_is_measured_and_it_is_said():
    flops, source = peak_of(torch.device("cpu"), "float32")
    assert flops > 1e8 and source.startswith("measured: product of 512 x 512 matrices, float32")


def test_peak_memory_sees_what_is_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    held = torch.ones(64 * 2**20)  # 256 MiB
    del held
    assert 0.9 < (memory.read() - memory.before) / 2**28 < 1.3


def test_spread_of_a_rate():
    spread = Spread.of([1.0, 2.0, 4.0])
    assert spread.median == 2.0 and spread.inverse(8).median == 4.0
    assert spread.inverse(8).p10 < 4.0 < spread.inverse(8).p90


def test_a_recipe_that_cannot_be_measured_leaves_the_others_in_the_table(tmp_path, monkeypatch):
    measure = benchmark.measure

    def short_of_memory(cfg):
        if cfg.name == "sit_b":
            raise torch.OutOfMemoryError("out of memory\nand how")
        return measure(cfg)

    monkeypatch.setattr(benchmark, "measure", short_of_memory)
    with pytest.raises(UserError, match="1 of 3 not measured; sit_b: out of memory$"):
        measured(tmp_path, "task.recipes=[sit_s,sit_b,dit_s]")
    rows = json.loads(next(tmp_path.rglob("benchmark.json")).read_text())
    assert [row["recipe"] for row in rows] == ["sit_s", "dit_s"]
    assert "Not measured: sit_b: out of memory." in next(tmp_path.rglob("benchmark.md")).read_text()


def test_a_recipe_of_another_name_is_refused_before_any_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda cfg: pytest.fail("measured"))
    with pytest.raises(UserError, match="sit_z"):
        measured(tmp_path, "task.recipes=[sit_s,sit_z]")


def test_processor_seconds(tmp_path):
    (row,) = measured(tmp_path, "experiment=sit_s", "task.clock=cpu")
    assert row["clock"] == "cpu" and 0 < row["mfu"] < 1
    assert "processor seconds" in next(tmp_path.rglob("benchmark.md")).read_text()
