"""What sharing the encoder saves and what it changes, on a small DDT; and the order of the samplers.

    python experiments/ddt_sharing/study.py

Trains a DDT of 4 + 2 blocks on the embedded data (minutes on two cores; run again, it is there already), measures the
similarity of its states, samples 250 steps with every schedule, and integrates a field whose flow is known. Writes
sharing.csv, orders.csv, table.md, similarity.png and sharing.png beside this file.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from repalign.backbones.clocks import unwrapped  # noqa: E402
from repalign.guidance.cfg import NoGuidance  # noqa: E402
from repalign.paths.linear import LinearPath  # noqa: E402
from repalign.paths.parametrization import Velocity  # noqa: E402
from repalign.random import SampleRandom  # noqa: E402
from repalign.samplers.euler import Euler  # noqa: E402
from repalign.samplers.field import DenoisingField  # noqa: E402
from repalign.samplers.heun import Heun  # noqa: E402
from repalign.samplers.multistep import LinearMultistep  # noqa: E402
from repalign.samplers.refresh import Every, SharedCarry, Statistical  # noqa: E402
from repalign.state import Output  # noqa: E402
from tasks.build import assemble, load_weights  # noqa: E402
from tasks.launch import compose  # noqa: E402

STEPS, SAMPLES, REPEATS, RATES = 250, 16, 2, (2, 4, 8)
RECIPE = [
    "experiment=demo",
    "backbone=ddt_demo",
    "clock=reversed",
    "aligner=ddt",
    "method=ddt",
    "align.tap=encoder.3",
    "align.hidden=256",
    "guidance=ddt",
    "sampler=ddt_euler",
    "sampler.steps=250",
    "~callbacks.evaluate",
    "callbacks.sample_grid.every=100000",
    "steps=400",
    "run_name=ddt_sharing",
]
RUN = Path(os.environ.get("REPALIGN_RUNS", "runs")) / "demo" / "ddt_sharing"


def main() -> None:
    """Train, measure, write."""
    if not (RUN / "checkpoints").is_dir():
        run(*RECIPE)
    if not (RUN / "sharing" / "similarity.png").is_file():
        run("task=sharing", "task.batch_size=8", f"task.rates={list(RATES)}", *RECIPE)
    shutil.copy(RUN / "sharing" / "similarity.png", HERE / "similarity.png")
    rows = sharing(RUN / "sharing" / "similarity.safetensors")
    orders = convergence()
    write("sharing.csv", rows)
    write("orders.csv", orders)
    table(rows, orders)
    draw(rows)


def run(*words: str) -> None:
    """One command of the project."""
    subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True, cwd=ROOT)


def sharing(similarity: Path) -> list[dict[str, float | str]]:
    """Evaluations, wall time and distance to the unshared samples, with guidance in DDT's interval and without."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # tensors this small gain nothing by a second thread, and the times are steadier
    module = assemble(compose([*RECIPE, "callbacks=sampling"])).module
    load_weights(module, sorted((RUN / "checkpoints").glob("*.ckpt"))[-1])
    backbone = module.ema.module["backbone"].eval()
    net, sampler = unwrapped(backbone), Euler(STEPS, last_step_size=0.04)
    label = torch.arange(SAMPLES) % module.conditioner.num_classes
    random = SampleRandom(1, range(SAMPLES))
    x_1 = random.normal("x_1", module.latent_shape)
    cond, null = module.conditioner({"label": label}), module.conditioner.null(SAMPLES, label.device)
    schedules = {"none": Every(1)}
    schedules |= {f"every {k}": Every(k) for k in RATES}
    schedules |= {f"programme {k}": Statistical(str(similarity), k) for k in RATES}

    def pictures(latent: Tensor) -> Tensor:
        return 255 * module.autoencoder.decode(module.autoencoder.norm.denormalize(latent))

    rows: list[dict[str, float | str]] = []
    for guided, rule in (("scale 2, 0 < t < 0.7", module.guidance), ("off", NoGuidance())):
        field = rule(lambda c: DenoisingField(backbone, LinearPath(), Velocity(), c), cond, null)
        reference: Tensor | None = None
        for name, schedule in schedules.items():
            wall, cpu, found = [], [], x_1
            for _ in range(REPEATS):
                with counted(net.encoder[0]) as encoder:
                    begin = time.perf_counter(), time.process_time()
                    latent = SharedCarry(sampler, schedule)(field, x_1, random)
                    wall.append(time.perf_counter() - begin[0])
                    cpu.append(time.process_time() - begin[1])
                assert isinstance(latent, Tensor)
                found = latent
            reference = found if reference is None else reference
            error = (found - reference).square().flatten(1).mean(1).sqrt() / reference.std()
            rows.append(
                {
                    "guidance": guided,
                    "schedule": name,
                    "encoder evaluations": len(encoder),
                    "wall seconds": min(wall),
                    "CPU seconds": min(cpu),
                    "latent distance": float(error.mean()),
                    "pixel distance": float((pictures(found) - pictures(reference)).abs().mean()),
                }
            )
            print(rows[-1], flush=True)
    return rows


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Collects one entry per call of a module."""
    calls: list[int] = []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


class Curved:
    """dx/dt = -x g(t), whose flow is known: g = 3 sin(3 t), or 9 (1 - t)^5, flat where the integration begins."""

    path, parametrization, uses_carry = LinearPath(), Velocity(), False

    def __init__(self, flat: bool) -> None:
        self.flat = flat
        self.factor = math.exp(1.5 if flat else 1 - math.cos(3))

    def during(self, t: Tensor) -> Curved:
        return self

    def __call__(self, x_t: Tensor, t: Tensor, carry: object = None) -> Output:
        g = 9 * (1 - t) ** 5 if self.flat else 3 * torch.sin(3 * t)
        return Output(-g * x_t)


def convergence() -> list[dict[str, float | str]]:
    """Slopes of log error over log step between 300 and 600 steps, in float64."""
    samplers: dict[str, Callable[[int], Euler | Heun | LinearMultistep]] = {
        "Euler": lambda n: Euler(n, dtype="float64"),
        "Heun": lambda n: Heun(n, dtype="float64"),
        "Heun, last step Euler": lambda n: Heun(n, correct_last=False, dtype="float64"),
        "Heun, slopes reused": lambda n: Heun(n, correct_last=False, reuse_slope=True, dtype="float64"),
    }
    for order in range(1, 5):
        samplers[f"multistep {order}"] = lambda n, order=order: LinearMultistep(n, order, dtype="float64")
    random = SampleRandom(3, range(4))
    x_1 = random.normal("x_1", (3,), torch.float64)
    rows: list[dict[str, float | str]] = []
    for name, make in samplers.items():
        row: dict[str, float | str] = {"sampler": name}
        for key, field in (("flat at the noise", Curved(True)), ("curved at the noise", Curved(False))):
            errors = [float((make(n)(field, x_1, random) - field.factor * x_1).abs().max()) for n in (300, 600)]
            row[key] = math.log2(errors[0] / errors[1])
        rows.append(row)
    return rows


def write(name: str, rows: list[dict[str, float | str]]) -> None:
    """A CSV file."""
    with open(HERE / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def table(*tables: list[dict[str, float | str]]) -> None:
    """Both tables as Markdown."""
    lines: list[str] = []
    for rows in tables:
        lines += ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        for row in rows:
            cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    (HERE / "table.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def draw(rows: list[dict[str, float | str]]) -> None:
    """Distance to the unshared samples over the number of encoder evaluations."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, guided in zip(
        figure.subplots(1, 2, sharey=True), dict.fromkeys(r["guidance"] for r in rows), strict=True
    ):
        for kind, label in (("every", "every K-th step"), ("programme", "dynamic programme")):
            own = [r for r in rows if r["guidance"] == guided and str(r["schedule"]).startswith(kind)]
            axes.plot(
                [r["encoder evaluations"] for r in own], [r["latent distance"] for r in own], marker="o", label=label
            )
        axes.set(xlabel=f"encoder evaluations of {STEPS}", title=f"guidance: {guided}", xscale="log")
        axes.set_xticks([31, 62, 125], ["31", "62", "125"])
        axes.minorticks_off()
        axes.legend()
    figure.axes[0].set_ylabel("RMS distance of latents / their std")
    figure.savefig(HERE / "sharing.png", dpi=150)


if __name__ == "__main__":
    main()
