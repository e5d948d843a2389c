"""What a training does, in few numbers: curves that can be compared, and facts that tell causes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from repalign.state import State, Tokens, latent_of

KEPT = 4_000_000  # weights that are compared with where they began


class TrainingFacts(pl.Callback):
    """Notes every step's terms, and what latents, features, times, conditions and average look like.

    Reads what passes between the parts: the objective's x_0, the x_t and t that the live backbone is given, tokens of
    encoders. Nothing is drawn and no weight is touched, so the training is the one without it.

    Attributes:
        curves: losses, gradient norms and learning rate by name, a number per step.
        facts: when the training has ended (names: :meth:`_facts`).
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {}
        self.facts: dict[str, float] = {}
        self._undo: list[Callable[[], Any]] = []
        self._x_0: Tensor | None = None
        self._told: list[tuple[Tensor, Tensor]] = []  # t and the cosine of x_t and x_0, of every sample
        self._moments: dict[str, list[Tensor]] = {}
        self._dropped: list[Tensor] = []
        self._begun: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Listen to the parts that are there."""
        if not hasattr(pl_module, "trained"):
            return  # a first stage: curves alone
        objective = pl_module.objective
        if isinstance(objective, nn.Module):
            hook = objective.register_forward_pre_hook(lambda _, args: self._see_objective(*args))
            self._undo.append(hook.remove)
        else:
            pl_module.objective = _Observed(objective, self._see_objective)
            self._undo.append(lambda: setattr(pl_module, "objective", objective))
        hook = pl_module.backbone.register_forward_pre_hook(lambda _, args: self._see_backbone(*args[:2]))
        self._undo.append(hook.remove)
        for name, encoder in pl_module.encoders.items():
            if isinstance(encoder, nn.Module):
                self._undo.append(encoder.register_forward_hook(self._hook_for(name)).remove)
        self._begun = [x.detach().clone() for x in _some(pl_module.trained)]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Features that come from a store."""
        for name, value in batch.items():
            if name.startswith("features/"):
                self._see_tokens(name.removeprefix("features/"), value)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The numbers of a finished step."""
        terms = pl_module.finished_terms
        if len(self.curves.get("train/loss", [])) == pl_module.progress.step or not terms:
            return  # a micro-batch
        for name, value in terms.items():
            self.curves.setdefault(name, []).append(float(value))
        self.curves.setdefault("train/lr", []).append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the ears away, draw the facts together."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.facts = self._facts(pl_module)

    def _see_objective(self, backbone: Any, x_0: State, cond: Any, draw: Any, *rest: Any) -> None:
        latent = latent_of(x_0)
        self._x_0 = latent
        self._note("latent", latent)
        self._dropped += [lost.float().mean().cpu() for name, lost in draw.drop.items() if lost.dtype == torch.bool]

    def _see_backbone(self, x_t: State, t: Tensor | None) -> None:
        noisy, clean = latent_of(x_t), self._x_0
        if t is None or clean is None or noisy.shape != clean.shape or len(t) != len(clean):
            return
        rows = (x.detach().flatten(1).float() for x in (noisy, clean))
        cosine = nn.functional.cosine_similarity(*rows, dim=1)
        self._told.append((t.detach().float().reshape(len(t), -1).mean(1).cpu(), cosine.cpu()))

    def _hook_for(self, encoder: str) -> Callable[[nn.Module, Any, Tokens], None]:
        return lambda network, images, tokens: self._see_tokens(encoder, tokens.data)

    def _see_tokens(self, name: str, tokens: Tensor) -> None:
        rows = tokens.detach().float().flatten(0, -2)
        spread = rows.std(0).mean() if len(rows) > 1 else rows.new_zeros(())
        self._moments.setdefault(f"features/{name}/size", []).append(rows.square().mean().sqrt().cpu())
        self._moments.setdefault(f"features/{name}/spread", []).append(spread.cpu())

    def _note(self, name: str, values: Tensor) -> None:
        values = values.detach().float()
        self._moments.setdefault(f"{name}/mean", []).append(values.mean().cpu())
        self._moments.setdefault(f"{name}/std", []).append(values.std().cpu())

    def _facts(self, module: Any) -> dict[str, float]:
        """By name: ``latent/mean``, ``latent/std`` of normalised latents; ``features/NAME/size`` (root mean square) and
        ``features/NAME/spread`` (mean deviation of a channel over pictures and places); ``near_data`` and
        ``near_noise``: cosine of x_t and x_0 where the network is told t < 1/3 and t > 2/3; ``dropped``: share of
        conditions that were dropped; ``ema/moved``: how far the average went, as a part of how far the weights went.
        """
        facts = {name: float(torch.stack(values).mean()) for name, values in self._moments.items()}
        if self._told:
            t, cosine = (torch.cat(column) for column in zip(*self._told, strict=True))
            for name, chosen in (("near_data", t < 1 / 3), ("near_noise", t > 2 / 3)):
                if chosen.any():
                    facts[name] = float(cosine[chosen].mean())
        if self._dropped:
            facts["dropped"] = float(torch.stack(self._dropped).mean())
        if self._begun:
            live, averaged = (_distance(_some(x), self._begun) for x in (module.trained, module.ema.module))
            facts["weights/moved"] = live
            facts["ema/moved"] = averaged / live if live else 0.0
        return facts


class _Observed:
    """An objective, and somebody who sees what it is called with."""

    def __init__(self, objective: Any, see: Callable[..., None]) -> None:
        self._objective = objective
        self._see = see

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._see(*args)
        return self._objective(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


def _some(module: nn.Module) -> list[Tensor]:
    """Parameters, in their order, up to a number of weights."""
    chosen, count = [], 0
    for parameter in module.parameters():
        if count + parameter.numel() <= KEPT:
            chosen.append(parameter)
            count += parameter.numel()
    return chosen


def _distance(now: list[Tensor], then: list[Tensor]) -> float:
    with torch.no_grad():
        squares = [(a.float() - b.float()).square().sum() for a, b in zip(now, then, strict=True)]
    return float(torch.stack(squares).sum().sqrt())
