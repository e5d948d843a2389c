"""DeepFlow."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.objectives.deepflow import DeepSupervision
from repalign.paths.parametrization import Velocity


class DeepFlow(Generative):
    """Deeply Supervised Flow-Based Generative Models (Shin et al., ICCV 2025, arXiv:2503.14494).

    SiT in K branches. Branch k, at its own time t_k, predicts a velocity v_k; a VeRA block refines its features with an
    acceleration a_k, modulated by t_{k+1} - t_k, and lets the embedded input attend to them for the next branch.
    loss = sum_k w_k mean |v_k - (eps - x_0)|^2 + sum_{k<K} mean |x_{t_k} - sg(v_k) t_k + a_k t_k^2 / 2 - x_0|^2
    (+ REPA's term at the taps ``vera.k``). Samples as SiT: all branches at one time, the last velocity.
    Differs from the base by its contract alone: branches, weights and objective belong together.
    """

    def contract(self) -> None:
        objective = self.objective
        branches = getattr(self.backbone, "branches", 1)
        self.require(
            isinstance(objective, DeepSupervision), "needs deep supervision; set objective=deepflow time_sampler=ladder"
        )
        self.require(
            branches == len(objective.weights),
            f"the backbone has {branches} branch(es), objective.weights has {len(objective.weights)}; set "
            "backbone=deepflow_*, clock=native and one weight a branch",
        )
        self.require(isinstance(self.parametrization, Velocity), "predicts velocities; set parametrization=velocity")
