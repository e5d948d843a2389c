"""The losses of REPA-E: an autoencoder learns from the alignment of the denoiser that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstructed
from repalign.objectives.regularizers import Reconstructing
from repalign.protocols import Aligner, Backbone, Conditioner, Encoder, LatentNorm, Objective, Randomness
from repalign.state import Draw, Losses
from repalign.training.step import Batch, draw_of, images_of, losses_at, own_terms, total_of, weight_at, with_features


@dataclass(frozen=True)
class Shared:
    """What the phases of a round have in common.

    Attributes:
        batch: pictures, labels, cached features.
        reconstructed: the pass through the autoencoder, with its graph.
        draw: times, noise and dropped labels of the denoiser.
    """

    batch: Batch
    reconstructed: Reconstructed
    draw: Draw


class EndToEnd:
    """Joint training of autoencoder and denoiser (Leng, Singh et al., ICCV 2025, arXiv:2504.10483, section 3).

    With raw latents z = mu + s n of pictures x, reconstructions x', a latent norm N and REPA's alignment loss L_REPA:

        autoencoder:    L_rec(x, x') + w_GAN (-mean D(x')) + w_KL KL + a L_REPA(N_running(z), t, eps, y) [+ d L_diff]
        discriminator:  hinge(D(x), D(sg x'))
        denoiser:       L_diff(N_batch(sg z), t, eps, y or null) + lambda L_REPA

    Times t and noise eps are the same in both passes; labels are dropped in the denoiser's alone. sg stops gradients:
    the diffusion loss does not reach the autoencoder (it would make latents easy to predict and pictures bad). In the
    autoencoder's phase the transformer passes gradients and does not move, and stops after the last tap.

    Args:
        first_stage: reconstruction, regularizer and adversary.
        objective, conditioner, aligners, encoders: of the denoiser; the aligners' weights lambda hold in its phase.
        alignment: a, the weight of the mean over the aligners (in proportion to their weights) in the autoencoder's
            phase; 1.5 in the paper.
        diffusion: d; 0 in the paper, 1 for its ablation without stop-gradient.
    """

    def __init__(
        self,
        *,
        first_stage: FirstStage,
        objective: Objective,
        conditioner: Conditioner,
        aligners: Mapping[str, Aligner],
        encoders: Mapping[str, Encoder],
        alignment: float,
        diffusion: float = 0.0,
    ) -> None:
        self.first_stage = first_stage
        self.objective = objective
        self.conditioner = conditioner
        self.aligners = aligners
        self.encoders = encoders
        self.alignment = alignment
        self.diffusion = diffusion

    def begin(self, autoencoder: Reconstructing, batch: Batch, random: Randomness) -> Shared:
        """Encode, draw a latent (stream ``posterior``), decode; draw times, noise and dropped labels."""
        images = images_of(batch)
        assert images is not None, "an autoencoder under training needs pictures"
        reconstructed = self.first_stage.reconstruct(autoencoder, images, random)
        # Both passes of the denoiser align with the same tokens: each encoder runs once a round.
        batch = with_features(batch, self.encoders, self.encoders.keys())
        return Shared(batch, reconstructed, draw_of(self.objective, self.conditioner, reconstructed.latent, random))

    def autoencoder_loss(
        self, shared: Shared, autoencoder: Reconstructing, norm: LatentNorm, backbone: Backbone, step: int
    ) -> Losses:
        """The first phase; ``norm`` and ``backbone`` in evaluation mode, their parameters without gradients."""
        stage = self.first_stage.autoencoder_loss(autoencoder, shared.reconstructed, step)
        # Nobody has dropped a label here: the network is in evaluation mode in the official code.
        terms = self._terms(shared, replace(shared.draw, drop={}), norm, backbone, detach=False)
        total = stage.total + self.alignment * self._alignment(terms)
        if self.diffusion:
            total = total + self.diffusion * torch.stack(own_terms(terms)).sum()
        return Losses(total, {f"autoencoder/{name}": term for name, term in {**stage.terms, **terms}.items()})

    def discriminator_loss(self, shared: Shared, step: int) -> Losses:
        """The second phase, on the reconstructions from before the autoencoder's step."""
        stage = self.first_stage.discriminator_loss(shared.reconstructed, step)
        return Losses(stage.total, {f"discriminator/{name}": term for name, term in stage.terms.items()})

    def denoiser_loss(self, shared: Shared, norm: LatentNorm, backbone: Backbone) -> Losses:
        """The third phase: REPA's loss on detached latents; ``norm`` in training mode follows them."""
        terms = self._terms(shared, shared.draw, norm, backbone, detach=True)
        return Losses(total_of(terms, self.aligners), terms)

    def _terms(
        self, shared: Shared, draw: Draw, norm: LatentNorm, backbone: Backbone, *, detach: bool
    ) -> dict[str, Tensor]:
        raw = shared.reconstructed.latent
        return losses_at(
            draw,
            backbone=backbone,
            objective=self.objective,
            conditioner=self.conditioner,
            aligners=self.aligners,
            encoders=self.encoders,
            x_0=norm.normalize(raw.detach() if detach else raw),
            batch=shared.batch,
            only_taps=not detach and not self.diffusion,
        )

    def _alignment(self, terms: Mapping[str, Tensor]) -> Tensor:
        weights = {name: weight_at(aligner.weight, None) for name, aligner in self.aligners.items()}
        return torch.stack([w * terms[f"align/{name}"] for name, w in weights.items()]).sum() / sum(weights.values())
