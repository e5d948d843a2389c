"""In the place of REPA's loss: its interface and its draws, written for the tests."""

import torch
import torch.nn.functional as F


class SILoss:
    def __init__(self, prediction, path_type, weighting):
        assert (prediction, path_type, weighting) == ("v", "linear", "uniform")

    def __call__(self, model, images, model_kwargs, zs):
        t = torch.rand((len(images), 1, 1, 1))
        noise = torch.randn_like(images)
        velocity, projected = model(torch.lerp(images, noise, t), t[:, 0, 0, 0], **model_kwargs)
        alignment = [-F.cosine_similarity(z, own, dim=-1).mean() for z, own in zip(zs, projected, strict=True)]
        return F.mse_loss(velocity, noise - images, reduction="none").mean((1, 2, 3)), sum(alignment) / len(alignment)
