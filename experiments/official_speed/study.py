"""Sampling beside MCG-NJU/DDT: a guidance interval, and an encoder that is shared between steps.

    python experiments/official_speed/study.py CHECKOUT_OF_DDT

Both networks have the same (random) weights, labels and noise; every sampler is run in turn, so that all meet the same
machine. Prints the table of the README and writes it to sampling.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.performance.spread import Spread
from repalign.protocols import Sampler
from repalign.random import SampleRandom
from repalign.samplers.euler import Euler
from repalign.samplers.field import DenoisingField
from repalign.samplers.refresh import Every, SharedCarry
from repalign.state import Cond
from tasks.build import assemble
from tasks.launch import compose
from tasks.peer import awaken, difference
from tasks.peers import peer_of
from tasks.peers.loading import import_from
from tasks.tables import markdown

INTERVAL, SCALE, LAST = 0.7, 2.0, 0.04  # the official configuration at 256 px, in our time
FLOW = "src.diffusion.stateful_flow_matching"


def main() -> None:
    """Measure and write the table."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    words.add_argument("checkout", type=Path)
    words.add_argument("--batch", type=int, default=4)
    words.add_argument("--steps", type=int, default=32)
    words.add_argument("--image", type=int, default=128, help="side in pixels; a token stands for 16 x 16 of them")
    words.add_argument("--rates", type=int, nargs="*", default=(2, 4, 8), help="of sharing")
    words.add_argument("--repeats", type=int, default=5)
    words.add_argument("--split", type=int, nargs=2, default=(22, 6), help="blocks of encoder and decoder (XL: 22 6)")
    words.add_argument("--cpu", action="store_true", help="processor seconds, for a machine that others use too")
    given = words.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        cfg = compose(
            [
                "experiment=ddt_b",
                "data=synthetic",
                f"data.image_size={given.image}",
                "autoencoder=tiny",
                "autoencoder.channels=4",
                "encoder=tiny",
                "align.tap=encoder.1",
                "trainer=cpu",
                "backbone.dim=384",
                "backbone.heads=6",
                f"backbone.depth={sum(given.split)}",
                f"backbone.encoder_depth={given.split[0]}",
                f"paths.runs={folder}",
            ]
        )
        module = assemble(cfg).module
    awaken(module.trained)
    module.eval()
    peer = peer_of(given.checkout, module)
    network = peer.network.eval()
    sampling, scheduling, guidance = import_from(
        given.checkout, f"{FLOW}.sampling", f"{FLOW}.scheduling", "src.diffusion.base.guidance"
    )
    random = SampleRandom(0, range(given.batch))
    noise = random.normal("x_1", module.latent_shape)
    label = torch.arange(given.batch) % module.conditioner.num_classes
    null = module.conditioner.null(given.batch, noise.device)

    def official(every: int) -> Callable[[], Tensor]:
        sampler = sampling.EulerSampler(
            scheduler=scheduling.LinearScheduler(),
            guidance_fn=guidance.simple_guidance_fn,
            num_steps=given.steps,
            guidance=SCALE,
            guidance_interval_min=1 - INTERVAL,
            guidance_interval_max=1.0,
            state_refresh_rate=every,
            last_step=LAST,
        )
        return lambda: sampler(network, noise, label, null.label)

    def ours(every: int | None) -> Callable[[], Tensor]:
        euler = Euler(given.steps, last_step_size=LAST)
        sampler: Sampler = euler if every is None else SharedCarry(euler, Every(every))
        guided = ClassifierFreeGuidance(SCALE, (0.0, INTERVAL), open_interval=True)

        def bind(cond: Cond) -> DenoisingField:
            return DenoisingField(module.backbone, module.path, module.parametrization, cond)

        return lambda: sampler(guided(bind, Cond(label=label), null), noise, random)

    runs = {
        "official, no sharing": official(1),
        "ours, no sharing": ours(None),
        **{f"official, every {k}": official(k) for k in given.rates},
        **{f"ours, every {k}": ours(k) for k in given.rates},
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    states: dict[str, Tensor] = {}
    with torch.no_grad():
        for repeat in range(given.repeats + 1):  # the first one warms up
            for name, run in runs.items():
                begin = clock()
                states[name] = run()
                if repeat:
                    seconds[name].append(clock() - begin)
    base = seconds["official, no sharing"]
    lines = []
    for name, taken in seconds.items():
        ratio = Spread.of([b / t for b, t in zip(base, taken, strict=True)])
        twin = name.replace("ours", "official")
        lines.append(
            [
                name,
                f"{Spread.of(taken).median:.2f}",
                f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})",
                "" if twin == name else f"{difference(states[name], states[twin]):.1e}",
            ]
        )
    table = markdown(["sampler", "seconds", "times as fast as official", "differs from official twin by"], lines)
    print(table)
    print(json.dumps({"threads": torch.get_num_threads(), **{k: str(v) for k, v in vars(given).items()}}))
    (Path(__file__).parent / "sampling.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
