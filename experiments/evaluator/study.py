"""The evaluator: does a number move with the batch, the order or the processes; how fast; does it agree with others?

    python experiments/evaluator/study.py [FOLDER]

A few minutes on two cores. Writes results.md beside this file.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch_fidelity.metric_fid import fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402
from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: E402

from datamodules.synthetic import Shapes  # noqa: E402
from repalign.encoders.lite0 import Lite0Features  # noqa: E402
from repalign.metrics.discrepancy import GaussianDiscrepancy  # noqa: E402
from repalign.metrics.frechet import FrechetDistance  # noqa: E402
from repalign.metrics.inception_score import InceptionScore  # noqa: E402
from repalign.metrics.kid import KernelDistance  # noqa: E402
from repalign.metrics.manifold import Coverage, Density, Precision, Recall  # noqa: E402
from repalign.metrics.reference import Reference  # noqa: E402
from repalign.metrics.suite import FeatureMetrics  # noqa: E402
from tasks.drawing import Drawing  # noqa: E402

REAL, MADE = 300, 251  # pictures; the second is a prime
DRAWN = 2000  # pictures that are drawn and killed
SCORED = 64  # pictures of the measurement of speed
ROUNDS = 2

lines: list[str] = []


def say(line: str = "") -> None:
    """Print, and keep for results.md."""
    print(line, flush=True)
    lines.append(line)


def pictures() -> tuple[Tensor, Tensor]:
    """Drawn shapes, and others of the same kind, every third with a little noise over it."""
    real, _ = Shapes(REAL, 64).load(range(REAL))
    made, _ = Shapes(MADE, 64, seed=1).load(range(MADE))
    noise = 0.02 * torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
    noise[torch.arange(MADE) % 3 > 0] = 0
    return torch.from_numpy(real).float() / 255, (torch.from_numpy(made).float() / 255 + noise).clamp(0, 1)


def metrics(reference: Reference, network: nn.Module, draws: int = 0, chunk: int = 64) -> FeatureMetrics:
    """Every score on one network."""
    scores = {
        "fd": FrechetDistance(),
        "is": InceptionScore(splits=10),
        "kd": KernelDistance(subsets=20, subset_size=200),
        "precision": Precision(3),
        "recall": Recall(3),
        "density": Density(5),
        "coverage": Coverage(5),
        "mmd": GaussianDiscrepancy(),
    }
    found = FeatureMetrics(network, scores, chunk, draws)  # type: ignore[arg-type]
    found.set_reference(reference)
    return found


def forked(work: Callable[[], Any]) -> int:
    """Work in a child process; its number."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def wait_for(children: list[int]) -> list[int]:
    """Exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def invariance(folder: Path, network: nn.Module, reference: Reference, made: Tensor) -> dict[str, float]:
    """One set of pictures, brought in in several ways."""

    def by_batch(size: int) -> dict[str, float]:
        scored = metrics(reference, network)
        for part in made.split(size):
            scored.update(part)
        return scored.compute()

    def by_order() -> dict[str, float]:
        scored = metrics(reference, network)
        for serials in torch.randperm(MADE, generator=torch.Generator().manual_seed(0)).split(50):
            scored.update(made[serials], serials)
        return scored.compute()

    def by_ranks(world: int) -> dict[str, float]:
        meet = folder / f"meet_{world}"

        def work(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
            scored = metrics(reference, network)
            for serials in torch.arange(rank, MADE, world).split(41):
                scored.update(made[serials], serials)
            scored.gather()
            if rank == 0:
                torch.save(scored.compute(), folder / f"ranks_{world}.pt")
            dist.barrier()

        assert wait_for([forked(lambda rank=rank: work(rank)) for rank in range(world)]) == [0] * world
        return torch.load(folder / f"ranks_{world}.pt", weights_only=True)

    whole = by_batch(MADE)
    names = [name for name in whole if not name.endswith("_std")]
    say("| pictures come | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    say("| all at once | " + " | ".join(f"{whole[name]:.8g}" for name in names) + " |")
    ways: dict[str, dict[str, float]] = {f"in batches of {size}": by_batch(size) for size in (1, 37, 200)}
    ways["in another order"] = by_order()
    ways |= {f"from {world} process(es)": by_ranks(world) for world in (1, 2, 3)}
    for way, found in ways.items():
        cells = []
        for name in names:
            change = abs(found[name] - whole[name]) / max(abs(whole[name]), 1e-12)
            cells.append("equal" if change == 0 else f"{change:.0e}")
        say(f"| {way} | " + " | ".join(cells) + " |")
    say()
    return whole


class Given(nn.Module):
    """Stands where torchmetrics expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features, computed before."""
        return features


def agreement(network: nn.Module, reference: Reference, made: Tensor, whole: dict[str, float]) -> None:
    """The same features through other packages."""
    scored = metrics(reference, network)
    scored.update(made)
    scored.compute()
    drawn = scored._drawn
    rows, real = drawn.rows("features"), reference.features
    moments = drawn.moments("pooled")
    sides = [
        {"mu": mean.numpy(), "sigma": covariance.numpy()}
        for mean, covariance in ((moments.mean, moments.covariance), (reference.mean, reference.covariance))
    ]
    fid = next(iter(fid_statistics_to_metric(*sides, False).values()))
    engine = FrechetInceptionDistance(Given(rows.shape[1]), input_img_size=(3, 1, 2))
    engine.update(real.double(), real=True)
    engine.update(rows.double(), real=False)
    few = real[: len(rows)]
    options = {"kid_subsets": 1, "kid_subset_size": len(few), "verbose": False}
    kid = kid_features_to_metric(rows, few, **options)["kernel_inception_distance_mean"]
    ours = KernelDistance(subsets=1, subset_size=len(few))
    own_kid, _ = ours(drawn, Reference(reference.mean, reference.covariance, len(few), few, "few"))
    logits = drawn.rows("logits")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))
    length = len(logits) // 10 * 10
    own_is, _ = InceptionScore(10)(_only(logits[order][:length]))
    again = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits[order][:length][again], 10, shuffle=False)["inception_score_mean"]
    prc = prc_features_to_metric(rows, real, prc_neighborhood=3, prc_batch_size=10_000, verbose=False)
    say("| score | this | other | relative difference | other is |\n|---|---|---|---|---|")
    for name, one, other, who in (
        ("Frechet distance", whole["fd"], fid, "torch-fidelity"),
        ("Frechet distance", whole["fd"], float(engine.compute()), "torchmetrics"),
        ("kernel distance", own_kid, kid, "torch-fidelity"),
        ("inception score", own_is, theirs, "torch-fidelity"),
        ("precision", whole["precision"], prc["precision"], "torch-fidelity"),
        ("recall", whole["recall"], prc["recall"], "torch-fidelity"),
    ):
        say(f"| {name} | {one:.8g} | {other:.8g} | {abs(one - other) / abs(other):.0e} | {who} |")
    say()


def _only(logits: Tensor) -> Any:
    from repalign.metrics.drawn import Drawn
    from repalign.metrics.features import Features

    drawn = Drawn({"logits"})
    drawn.add(torch.arange(len(logits)), Features(torch.zeros(len(logits), 1), logits))
    return drawn


def speed(folder: Path, network: nn.Module, reference: Reference, made: Tensor) -> None:
    """Pictures per second, and what it brings to score while the next pictures are drawn."""
    made = made[:SCORED]
    weight = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0)) / 40
    times: dict[str, list[float]] = {}
    used: dict[str, list[float]] = {}  # of the processor, by all threads: what other work on the machine does not move

    def scorer() -> FeatureMetrics:
        return metrics(reference, network, chunk=SCORED // 4)

    def scoring(number: int) -> None:
        scored = scorer()
        for part in made.split(SCORED // 4):
            scored.update(part)
        scored._look(whole=True)

    def busy(labels: Tensor, draws: Any) -> Tensor:
        state = weight
        for _ in range(12):  # stands for a sampler on the same processor: about as long as the scoring of the batch
            state = torch.tanh(state @ weight)
        return made[torch.tensor(draws.serials)] + 0 * state.sum()

    def elsewhere(labels: Tensor, draws: Any) -> Tensor:
        # Stands for a sampler on an accelerator: as long as the scoring of the batch, and the processor is free.
        time.sleep(statistics.median(times["scoring"]) * len(draws.serials) / SCORED)
        return made[torch.tensor(draws.serials)]

    def drawing(name: str, generator: Callable[[Tensor, Any], Tensor], overlap: bool, score: bool) -> None:
        scored, labels = scorer(), torch.zeros(SCORED, dtype=torch.int64)
        one = Drawing(folder / name, {}, labels, generator, 0, SCORED // 4, "round", torch.device("cpu"), overlap)
        one.draw(take=(lambda serials, images: scored.update(images.float() / 255, serials)) if score else None)
        scored._look(whole=True)

    works: dict[str, Callable[[int], None]] = {"scoring": scoring}
    for place, generator in (("the same processor", busy), ("an accelerator (stood for by a wait)", elsewhere)):
        for kind, overlap, score in (
            ("drawing", False, False),
            ("drawing, then scoring, of each batch", False, True),
            ("scoring beside the drawing", True, True),
        ):
            name = f"{kind}, sampler on {place}"
            works[name] = partial(_numbered, drawing, name, generator, overlap, score)
    for number in range(ROUNDS):
        for name, work in works.items():
            began, spent = time.perf_counter(), time.process_time()
            work(number)
            times.setdefault(name, []).append(time.perf_counter() - began)
            used.setdefault(name, []).append(time.process_time() - spent)
    say(f"| work on {SCORED} pictures, one thread of arithmetic | s | CPU s | pictures per CPU s |\n|---|---|---|---|")
    for name, values in times.items():
        cpu = statistics.median(used[name])
        say(f"| {name} | {statistics.median(values):.2f} | {cpu:.2f} | {SCORED / cpu:.0f} |")
    say()
    names = list(works)
    for apart, together in ((names[2], names[3]), (names[5], names[6])):
        gains = [a / b for a, b in zip(times[apart], times[together], strict=True)]
        place = apart.partition("sampler on ")[2]
        say(f"Gain of overlapping, sampler on {place}, median of the rounds' ratios: {statistics.median(gains):.2f}.")
    say()


def _numbered(work: Callable[..., None], name: str, *arguments: Any) -> None:
    """A folder of its own for every round."""
    *options, number = arguments
    work(f"{name} {number}", *options)


def killed(folder: Path, made: Tensor) -> None:
    """SIGKILL at random moments; the pictures against those that nobody disturbed."""

    def drawing(name: str) -> Drawing:
        def generator(labels: Tensor, draws: Any) -> Tensor:
            time.sleep(0.02)
            return (made[torch.tensor(draws.serials) % MADE] + 0.1 * draws.normal("x_1", made.shape[1:])).clamp(0, 1)

        labels = torch.arange(DRAWN) % 10
        return Drawing(folder / name, {}, labels, generator, 0, 16, "round", torch.device("cpu"))

    whole, hit, moments = drawing("whole"), 0, random.Random(0)
    began = time.perf_counter()
    whole.draw()
    took = time.perf_counter() - began
    for _ in range(5):
        child = forked(drawing("killed").draw)
        time.sleep(moments.uniform(0.05, 0.2) * took)
        os.kill(child, signal.SIGKILL)
        hit += wait_for([child]).count(-signal.SIGKILL)
    again = drawing("killed")
    again.draw()
    files = [{p.name: p.read_bytes() for p in one.folder.iterdir() if p.is_file()} for one in (whole, again)]
    same = "bit-identical" if files[0] == files[1] else "DIFFERENT"
    say(f"{DRAWN:,} pictures in shards of 256, SIGKILL 5 times ({hit} times at work), then to the end: {same}\n")


def interval(network: nn.Module, reference: Reference, made: Tensor) -> None:
    """The intervals of one evaluation."""
    scored = metrics(reference, network, draws=20)
    scored.update(made)
    values = scored.compute()
    names = [name for name in values if f"{name}_ci95" in values]
    say("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    say("| value | " + " | ".join(f"{values[n]:.4g}" for n in names) + " |")
    say("| ± (95 %) | " + " | ".join(f"{values[f'{n}_ci95']:.2g}" for n in names) + " |\n")


def study(folder: Path) -> None:
    """The sections of results.md."""
    torch.set_num_threads(1)
    real, made = pictures()
    network = Lite0Features()
    empty = FeatureMetrics(network, {})  # type: ignore[arg-type]
    reference = Reference.measure(empty._features, real.split(64), "shapes")
    say("## Invariance\n")
    whole = invariance(folder, network, reference, made)
    say("## Agreement on the same features\n")
    agreement(network, reference, made, whole)
    say("## Intervals\n")
    interval(network, reference, made)
    say("## Kills\n")
    killed(folder, made)
    say("## Speed\n")
    speed(folder, network, reference, made)
    (HERE / "results.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        study(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            study(Path(name))
