"""Rounds of phases on a toy pair: a 'maker' that follows a 'judge', and the judge that follows the data."""

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.joint import Joint
from repalign.errors import UserError
from repalign.state import Losses
from repalign.training.phase import Phase
from tasks.train import BY_HAND

SGD = partial(torch.optim.SGD, lr=0.1)


class Pair(Joint):
    def __init__(self, phases, accumulate=1):
        super().__init__(phases=phases, accumulate=accumulate, seed=0)
        torch.manual_seed(0)
        self.trained = nn.ModuleDict(
            {"maker": nn.Linear(2, 2), "judge": nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))}
        )
        self.seen = []
        self.check_phases()

    @property
    def parts(self):
        return dict(self.trained.items())

    def begin(self, batch, random):
        return {"x": batch["x"], "made": self.trained["maker"](batch["x"])}

    def losses(self, phase, shared):
        grads = {name: next(part.parameters()).requires_grad for name, part in self.parts.items()}
        self.seen.append((phase, grads, self.trained["judge"].training))
        if phase == "maker":
            return Losses(-self.trained["judge"](shared["made"]).mean(), {"made": shared["made"].mean()})
        judge = self.trained["judge"]
        return Losses((judge(shared["made"].detach()) - judge(shared["x"])).square().mean(), {})


def phases(**judge):
    return {
        "maker": Phase(trains=["maker"], evals=["judge"], optimizer=SGD, clip=1.0),
        "judge": Phase(trains=["judge"], optimizer=SGD, **judge),
    }


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch, rounds):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(rounds * 4, 2, generator=generator).split(batch)
        self.batch = batch

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "serial": torch.arange(i * self.batch, (i + 1) * self.batch)}


def fit(module, rounds=6, batch=4, max_steps=None, **trainer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=max_steps or rounds,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **BY_HAND,
            **trainer,
        )
        trainer.fit(module, DataLoader(Rows(batch, rounds), batch_size=None))
    return trainer


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.trained.parameters()])


def test_global_step_counts_rounds_and_each_phase_moves_its_own_part():
    module = Pair(phases())
    trainer = fit(module, rounds=9, max_steps=5)
    assert trainer.global_step == module.progress.step == 5
    first, second = module.seen[:2]
    assert first == ("maker", {"maker": True, "judge": False}, False)
    assert second == ("judge", {"maker": False, "judge": True}, True)
    assert all(p.requires_grad for p in module.trained.parameters())
    terms = module.finished_terms
    assert {"train/loss/maker", "train/loss/judge", "train/made", "train/grad_norm/maker"} <= terms.keys()
    torch.testing.assert_close(terms["train/loss"], terms["train/loss/maker"] + terms["train/loss/judge"])


def test_equals_two_optimizers_written_out():
    module = Pair(phases())
    module.trained["judge"][1].p = 0.0
    reference = Pair(phases())
    reference.trained["judge"][1].p = 0.0
    fit(module, rounds=3)
    maker, judge = reference.trained["maker"], reference.trained["judge"]
    optimizers = SGD(maker.parameters()), SGD(judge.parameters())
    for row in Rows(4, 3).x:
        made = maker(row)
        for optimizer, part, loss in (
            (optimizers[0], maker, lambda m=made: -judge(m).mean()),
            (optimizers[1], None, lambda m=made, x=row: (judge(m.detach()) - judge(x)).square().mean()),
        ):
            maker.zero_grad(), judge.zero_grad()
            loss().backward()
            if part is not None:
                nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
    torch.testing.assert_close(weights(module), weights(reference))


def test_micro_batches_make_the_same_round():
    whole, split = Pair(phases()), Pair(phases(), accumulate=2)
    for module in (whole, split):
        module.trained["judge"][1].p = 0.0
    fit(whole, rounds=4, batch=4)
    trainer = fit(split, rounds=4, batch=2)
    assert split.progress.step == trainer.global_step == 4
    torch.testing.assert_close(weights(whole), weights(split))


def test_a_phase_starts_late_and_schedules_go_by_rounds():
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 0.5**n)
    module = Pair(phases(start=3, scheduler=schedule))
    before = module.trained["judge"][0].weight.clone()
    fit(module, rounds=3)
    assert torch.equal(module.trained["judge"][0].weight, before)
    module = Pair(phases(start=3, scheduler=schedule))
    trainer = fit(module, rounds=5)
    assert not torch.equal(module.trained["judge"][0].weight, before)
    assert trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


def test_contract():
    with pytest.raises(UserError, match="Did you mean 'judge'"):
        Pair({"maker": Phase(trains=["maker"], evals=["judg"], optimizer=SGD)})
    with pytest.raises(UserError, match="start=0"):
        Pair({"maker": Phase(trains=["maker"], optimizer=SGD, start=2)})
    with pytest.raises(UserError, match="nothing to train"):
        Pair({"maker": Phase(trains=[], optimizer=SGD)}).configure_optimizers()
