"""DDT."""

from __future__ import annotations

from lightning_modules.repa import REPA


class DDT(REPA):
    """Decoupled Diffusion Transformer (Wang et al., arXiv:2504.05741).

    A condition encoder reads x_t, t and the label and gives s, one vector per token; a velocity decoder reads x_t
    again, modulated by s alone. loss = mean |v(x_t, s) - (eps - x_0)|^2 + lambda mean_n (1 - cos(h(z_n), f(image)_n))
    with z a hidden state of the encoder, lambda 0.5, and log-normal times. s changes slowly along a trajectory, so
    sampling may keep it for several steps (:mod:`repalign.samplers.refresh`).
    Differs from REPA by its contract alone: the backbone has a carry, which is s.
    """

    def contract(self) -> None:
        super().contract()
        self.require(self.backbone.uses_carry, "needs a backbone with a carry; set backbone=ddt_b (or ddt_l, ddt_xl)")
