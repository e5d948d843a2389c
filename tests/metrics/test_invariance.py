"""The same numbers whatever the batch size, the order of arrival and the number of processes."""

import os

import pytest
import torch
import torch.distributed as dist

from repalign.metrics.discrepancy import GaussianDiscrepancy
from repalign.metrics.features import Features
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.inception_score import InceptionScore
from repalign.metrics.kid import KernelDistance
from repalign.metrics.manifold import Coverage, Density, Precision, Recall
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tests.metrics.small import SmallNetwork, pictures

COUNT = 601  # no multiple of anything
EXACT = ("precision", "recall", "coverage")


class WithMap(SmallNetwork):
    """The small network with a spatial map."""

    def forward(self, images):
        pooled, logits = super().forward(images)
        return Features(pooled, logits, images[:, :, ::4, ::4].flatten(1))


def metrics(real):
    scores = {
        "fid": FrechetDistance(),
        "sfid": FrechetDistance("spatial"),
        "is": InceptionScore(splits=5),
        "kid": KernelDistance(subsets=5, subset_size=100),
        "precision": Precision(3),
        "recall": Recall(3),
        "density": Density(5),
        "coverage": Coverage(5),
        "cmmd": GaussianDiscrepancy(),
    }
    found = FeatureMetrics(WithMap(), scores, chunk=32, draws=4)
    found.set_reference(Reference.measure(found._features, [real], "real"))
    return found


@pytest.fixture(scope="module")
def sides():
    torch.set_num_threads(1)
    return pictures(400, 1), pictures(COUNT, 2, shift=0.03)


@pytest.fixture(scope="module")
def whole(sides):
    real, drawn = sides
    scored = metrics(real)
    scored.update(drawn)
    return scored.compute()


def agrees(found, whole, tolerance=1e-9):
    assert found.keys() == whole.keys()
    assert found == pytest.approx(whole, rel=tolerance, abs=1e-12)
    assert all(found[name] == whole[name] for name in EXACT)


@pytest.mark.parametrize("batch", [1, 37, 512])
def test_batch_size(sides, whole, batch):
    real, drawn = sides
    scored = metrics(real)
    for part in drawn.split(batch):
        scored.update(part)
    agrees(scored.compute(), whole)


def test_order_of_arrival(sides, whole):
    real, drawn = sides
    scored = metrics(real)
    for serials in torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).split(50):
        scored.update(drawn[serials], serials)
    agrees(scored.compute(), whole, 1e-5)  # a picture stands elsewhere in its portion: the network's own rounding


def _rank(rank, world, sides, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    real, drawn = sides
    scored = metrics(real)
    for serials in torch.arange(rank, COUNT, world).split(41):
        scored.update(drawn[serials], serials)
    scored.gather()
    assert scored.count == COUNT
    torch.save(scored.compute(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes(sides, whole, tmp_path, world):
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                _rank(rank, world, sides, tmp_path)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world
    for rank in range(world):
        agrees(torch.load(tmp_path / f"{rank}.pt", weights_only=True), whole, 1e-5)


def test_a_process_without_pictures(tmp_path):
    """Fewer pictures than processes: the widths of the features are learnt from the others."""
    sides, children = (pictures(40, 1), pictures(2, 2)), []

    def work(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        scored = FeatureMetrics(SmallNetwork(), {"fd": FrechetDistance()})
        scored.set_reference(Reference.measure(scored._features, [sides[0]], "real"))
        if rank == 0:
            scored.update(sides[1])
        scored.gather()
        assert scored.compute()["fd"] > 0 and scored.count == 2
        dist.destroy_process_group()

    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                work(rank)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
