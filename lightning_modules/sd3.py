"""Stable Diffusion 3."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.backbones.adapters import adapted_layers
from repalign.backbones.clocks import unwrapped
from repalign.backbones.mmdit import MMDiT
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity


class SD3(Generative):
    """Scaling Rectified Flow Transformers (Esser et al., ICML 2024, arXiv:2403.03206).

    x_t = (1 - t) x_0 + t eps; loss = mean |v(x_t, t, text) - (eps - x_0)|^2 with t from a density that favours the
    middle (logit-normal), moved towards the noise at high resolution: t <- s t / (1 + (s - 1) t), in training and in
    sampling. The network has two streams, text and image, that meet in joint attention; the text is three frozen
    encoders' states, each dropped on its own. With aligners it is REPA on a text-to-image network.
    """

    def contract(self) -> None:
        kind = type(unwrapped(self.backbone)).__name__
        self.require(
            isinstance(unwrapped(self.backbone), MMDiT), f"needs an MM-DiT; set backbone=mmdit_d24 (found {kind})"
        )
        self.require(
            isinstance(self.path, LinearPath) and isinstance(self.parametrization, Velocity),
            "is a rectified flow; set path=linear and parametrization=velocity",
        )
        self.require("caption" in self.conditioner.reads, "needs captions; set conditioner=sd3 and text_encoder=sd3")


class SD3Preference(SD3):
    """SD3 after preference tuning: Diffusion-DPO on the flow's error, low-rank additions alone (appendix C).

    margin = -(beta / 2) [(e_w - e_w^ref) - (e_l - e_l^ref)], e = mean |v - (eps - x_0)|^2 at one t and one eps for the
    preferred and the rejected picture of a prompt; loss = -log sigmoid(margin). The reference is the network with its
    additions switched off. Logged: ``figure/margin``, ``figure/accuracy`` and the four errors.
    """

    def contract(self) -> None:
        super().contract()
        self.require(
            getattr(self.objective, "pairs", False), "compares pairs; set objective=diffusion_dpo data=pairs_folder"
        )
        self.require(bool(adapted_layers(self.backbone)), "tunes low-rank additions; set tuning=lora")
