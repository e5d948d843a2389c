"""A module, a data module and a trainer that are as small as they can be."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.metrics.small import pictures


class TinyGenerator:
    """Colour by class, brightness by the weight, texture by the random stream."""

    def __init__(self, weight: nn.Linear):
        self.weight = weight

    def __call__(self, labels, random):
        assert not self.weight.training, "a generator is called in evaluation mode"
        colour = torch.stack([labels % 2, labels // 2 % 2, labels // 4 % 2], 1).float()[:, :, None, None] * 0.6
        noise = random.normal("x_1", (3, 8, 8))
        return (colour + 0.1 * noise + self.weight.weight.abs().mean()).clamp(0, 1)


class TinyModule(pl.LightningModule):
    def __init__(self, run_dir, steps_done=0):
        super().__init__()
        self.live, self.average = nn.Linear(2, 2), nn.Linear(2, 2).eval()
        nn.init.constant_(self.live.weight, 0.1)
        nn.init.constant_(self.average.weight, 0.05)
        self.run_dir = run_dir
        self.progress = SimpleNamespace(step=steps_done)
        self.drawn = []
        self.conditioner = SimpleNamespace(reads="label")

    def training_step(self, batch, batch_idx):
        assert self.live.training and not self.average.training
        self.drawn.append(torch.rand(()).item())
        return self.live(batch).pow(2).mean()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.progress.step += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.live.parameters(), lr=0.01)

    def generator(self, ema=True):
        return TinyGenerator(self.average if ema else self.live)


class TinyData(pl.LightningDataModule):
    class_names = ("animals", "flags", "food")
    num_classes = 3
    fingerprint = "tiny"
    attribution = None

    def __init__(self):
        super().__init__()
        self.source = SimpleNamespace(labels=np.array([0, 0, 0, 0, 0, 0, 2, 2]))
        self.read = 0

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 2), batch_size=2)

    def reference_images(self, batch_size):
        self.read += 1
        yield from pictures(24, 1).split(batch_size)


def trainer_with(callbacks, folder, steps, loggers=(), accumulate=1):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=list(loggers),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
    )
