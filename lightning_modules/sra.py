"""SRA."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.aligners.teacher import TeacherTarget


class SRA(Generative):
    """Self-Representation Alignment (Jiang et al., ICLR 2026, arXiv:2505.02831).

    loss = denoising + w_step mean d(h(z_m(x_t, t, y)), sg z_n(x_t', t', y)): z_m is the hidden state after an early
    block, h a two-layer head, z_n that of the averaged network (EMA) after a later block on the same image with the
    same noise at t' in (t - 0.2, t], and the same dropped labels; d is the smooth L1 distance. No encoder; one more
    pass per step, of the blocks up to n alone. The weight w_step falls late in training. On DiT t' is up to 199 steps
    earlier.

    Dual timesteps (arXiv:2607.02508): ``objective=dual_timestep aligner=sra_groups``. Tokens in two groups at two times
    that do not attend to each other; the teacher sees the same groups, each a little earlier.
    """

    def contract(self) -> None:
        taught = [a for a in self.aligners.values() if isinstance(a.target, TeacherTarget)]
        self.require(bool(taught), "needs an aligner with a teacher; set aligner=sra")
