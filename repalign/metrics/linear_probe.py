"""How well classes can be read from features that are held fixed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from repalign.errors import UserError, unknown_choice

HEADS = ("linear", "mlp")
STEPS = 200  # of the solver: the linear head converges long before
MLP_RATE, MLP_WIDTH = 3e-3, 64  # of AdamW; the least


def probe_accuracy(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    classes: int,
    head: str = "linear",
    weight_decay: float = 1e-3,
    seed: int = 0,
) -> float:
    """Share of test rows whose class a head finds that was trained on the other rows.

    Columns are brought to mean 0 and deviation 1 by the training rows, as the batch norm in front of a linear probe
    does. The linear head is multinomial logistic regression with an L2 penalty, solved by L-BFGS on all rows at once:
    no learning rate and no schedule stand between two representations. The other head has three layers of width D (64
    at least) with SiLU, 200 steps of AdamW on all rows. Both repeat bit by bit on one machine.

    Args:
        features: training rows.
        labels: their classes, 0 to classes - 1.
        test_features: rows that are not trained on.
        test_labels: their classes.
        classes: number of classes.
        head: 'linear', or 'mlp' for three layers.
        weight_decay: strength of the penalty, or AdamW's.
        seed: of the initial weights of 'mlp'.

    Raises:
        UserError: for another head, or when one of the sets has no rows.
    """
    if head not in HEADS:
        raise unknown_choice("task.head", head, HEADS)
    if not len(features) or not len(test_features):
        raise UserError(f"probe: {len(features)} pictures to train on and {len(test_features)} to test on; need both")
    rows, held_out = features.float(), test_features.float()
    mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-6)
    rows, held_out = (rows - mean) / deviation, (held_out - mean) / deviation
    network = _linear if head == "linear" else _mlp
    with torch.enable_grad():
        trained = network(rows, labels, classes, weight_decay, seed)
    with torch.no_grad():
        return float((trained(held_out).argmax(1) == test_labels).double().mean())


def _linear(rows: Tensor, labels: Tensor, classes: int, weight_decay: float, seed: int) -> nn.Module:
    network: Any = nn.utils.skip_init(nn.Linear, rows.shape[1], classes, device=rows.device)  # draws nothing
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    solver = torch.optim.LBFGS(network.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(network(rows), labels) + weight_decay / 2 * network.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return network


def _mlp(rows: Tensor, labels: Tensor, classes: int, weight_decay: float, seed: int) -> nn.Module:
    dim, width = rows.shape[1], max(rows.shape[1], MLP_WIDTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, classes)
        ).to(rows.device)
    solver = torch.optim.AdamW(network.parameters(), MLP_RATE, weight_decay=weight_decay)
    for _ in range(STEPS):
        solver.zero_grad()
        F.cross_entropy(network(rows), labels).backward()
        solver.step()
    return network
