"""SD3's preference tuning: Diffusion-DPO on the error of a rectified flow."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext

import torch
from torch import Tensor

from repalign.checkpoints.sd3 import SD3Adapter
from repalign.objectives.diffusion_dpo import DiffusionDPO
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.state import Cond, Draw, Tokens
from tests.golden.building import collect_gradients
from tests.golden.kinds.sd3 import build
from tests.golden.runner import Case, kind

POLICY = re.compile(r"every policy parameter = stored weight \+ (\S+)\*sign\(weight\); reference = stored weights")


@kind("sd3.dpo_loss")
def dpo_loss(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    reference = build(case.config, case.weights, inputs["x0_win"], ("beta", "policy"))
    told = POLICY.fullmatch(case.config["policy"])
    if told is None:
        raise ValueError(f"config.policy: '{case.config['policy']}' is not known; known: {POLICY.pattern}")
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += float(told[1]) * weight.sign()
    objective = DiffusionDPO(
        LinearPath(), Velocity(), Uniform(), case.config["beta"], lambda backbone: nullcontext(reference)
    )
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("context", "pooled", "t", "noise")}
    cond = Cond(text=Tokens(twice["context"]), pooled=twice["pooled"])
    x_0 = torch.cat([inputs["x0_win"], inputs["x0_lose"]])
    step = objective(policy, x_0, cond, Draw(twice["t"], twice["noise"]))
    loss, figures = step.losses["dpo"].mean(), step.figures
    gradients = SD3Adapter().to_official({"backbone": collect_gradients(policy, loss)})
    return {
        "err_win": figures["error/preferred"],
        "err_lose": figures["error/rejected"],
        "ref_err_win": figures["error/preferred_before"],
        "ref_err_lose": figures["error/rejected_before"],
        "logit": figures["margin"],
        "implicit_accuracy": figures["accuracy"].mean(),
        "loss": loss,
        **{f"grad/{key}": value for key, value in gradients.items()},
    }
