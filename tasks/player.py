"""What the page of task=play draws: settings to the composition of task=sample, and its pictures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from jaxtyping import UInt8
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from callbacks.pictures import evenly_spaced, generate
from callbacks.prompts import on_device
from repalign.errors import UserError
from repalign.guidance.recorded import Recorded
from repalign.metrics.features import to_uint8
from repalign.protocols import Field, Parametrization
from repalign.protocols import Path as DiffusionPath
from repalign.random import SampleRandom
from repalign.state import Output, State, latent_of, map_state
from repalign.training.generate import ImageGenerator, asked_by, pure_noise
from tasks.build import Assembly
from tasks.instantiate import build
from tasks.launch import CONF, choices, compose
from tasks.processes import device
from tasks.sample import wanted_labels

OWN = "the recipe's own"
# Of task=play alone: task=sample has no such keys.
PAGE_KEYS = ("task", "task.port", "task.browser", "task.frames")

Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Settings:
    """What is set on the page.

    Attributes:
        wanted: name of a class, or a caption where the method reads captions.
        count: number of pictures.
        seed: of every draw.
        sampler: choice of the group ``sampler``, or ``OWN``.
        steps: of the sampler; None for its own number.
        scale: of the guidance.
        interval: of the guidance, low and high.
    """

    wanted: str
    count: int = 8
    seed: int = 0
    sampler: str = OWN
    steps: int | None = None
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Drawn:
    """Pictures, the frames of the first one's denoising with their times, and the command that draws the same."""

    pictures: Pictures
    frames: Pictures
    times: Sequence[float]
    command: str


class Player:
    """Draws by composing exactly what ``task=sample`` would compose, around weights that were read once.

    Args:
        overrides: the command line of task=play.
        assembly: its objects.
        generator: around the weights of ``checkpoint``.
        checkpoint: named in the command that repeats a drawing, because a training may write a newer one.
        frames: of the denoising strip.
    """

    def __init__(
        self, overrides: list[str], assembly: Assembly, generator: ImageGenerator, checkpoint: Path, frames: int = 8
    ) -> None:
        typed = [word for word in overrides if word.lstrip("+~").split("=")[0] not in PAGE_KEYS]
        typed = [word for word in typed if not word.startswith("task.checkpoint=")]
        self.words = ["task=sample", *typed, f"task.checkpoint={quoted(str(checkpoint))}"]
        self.assembly, self.generator, self.checkpoint, self.frames = assembly, generator, checkpoint, frames
        self.cfg = compose(self.words)
        self._known: dict[str, tuple[list[str], DictConfig]] = {OWN: ([], self.cfg.sampler)}
        self.class_names = list(assembly.data.class_names)
        self.by_caption = asked_by(generator.conditioner) == "caption"
        self.samplers = [OWN, *self._fitting_samplers()]

    @property
    def start(self) -> Settings:
        """What the page shows first: the recipe's own settings."""
        guidance = self.cfg.guidance
        first = (list(self.assembly.data.captions or [""])[0] if self.by_caption else self.class_names[0]) or ""
        low, high = guidance.get("interval", (0.0, 1.0))
        return Settings(
            wanted=str(first),
            seed=int(self.cfg.task.seed),
            steps=self.steps_of(OWN),
            scale=float(guidance.get("scale", 1.0)),
            interval=(float(low), float(high)),
        )

    def takes_steps(self, sampler: str) -> bool:
        """Whether a sampler has a number of steps (an adaptive one has none)."""
        return "steps" in self._composed(sampler)

    def steps_of(self, sampler: str) -> int | None:
        """The sampler's own number of steps; None when it has none, or a named grid."""
        steps = str(self._composed(sampler).get("steps"))
        return int(steps) if steps.isdigit() else None

    def composition(self, settings: Settings) -> list[str]:
        """The words of a ``task=sample`` that draws the same pictures; what is the recipe's own is left out.

        Raises:
            UserError: for a class that is none, or an empty caption.
        """
        start, words = self.start, [f"task.num_samples={settings.count}", f"task.seed={settings.seed}"]
        if self.by_caption:
            if not settings.wanted.strip():
                raise UserError("prompt: is empty; write what the picture shows")
            words.append(f"task.prompts=[{quoted(settings.wanted)}]")
        else:
            if settings.wanted not in self.class_names:
                raise UserError(f"class: the data have no '{settings.wanted}'")
            words.append(f"task.classes=[{self.class_names.index(settings.wanted)}]")
        words += self._chosen(settings.sampler)[0]
        if settings.steps is not None and settings.steps != self.steps_of(settings.sampler):
            as_text = isinstance(self._composed(settings.sampler).get("steps"), str)
            words.append(f"sampler.steps={json.dumps(str(settings.steps)) if as_text else settings.steps}")
        if "scale" not in self.cfg.guidance and settings.scale != 1:
            words.append("guidance=cfg")
        if settings.scale != start.scale:
            words.append(f"guidance.scale={settings.scale}")
        if settings.interval != start.interval and settings.scale != 1:
            words.append(f"guidance.interval=[{settings.interval[0]},{settings.interval[1]}]")
        return [*self.words, *words]

    def draw(self, settings: Settings, watch: Callable[[float], object] | None = None) -> Drawn:
        """Draw.

        Args:
            settings: of the page.
            watch: told of the time of every call of the network.

        Raises:
            UserError: one line for a setting that the composition, the sampler or the guidance refuses.
        """
        words = self.composition(settings)
        cfg = compose(words)
        record = Recorded(build(cfg.guidance, "guidance"), watch)
        generator = replace(self.generator, sampler=build(cfg.sampler, "sampler"), guidance=record)
        wanted = wanted_labels(cfg, self.assembly)
        images = torch.cat(list(generate(generator, wanted, cfg.task.seed, cfg.task.batch_size, device())))
        chosen = evenly_spaced(min(self.frames, len(record.times)), len(record.times))
        chosen = [*chosen[:-1], len(record.times) - 1]  # the last estimate is the one the picture comes from
        latents = torch.cat([latent_of(record.estimates[i]).float() for i in chosen])
        with torch.no_grad():
            frames = generator.autoencoder.decode(generator.norm.denormalize(latents))
        return Drawn(
            rows(images, cfg.task.rounding),
            rows(frames, cfg.task.rounding),
            [record.times[i] for i in chosen],
            "python run.py " + shlex.join(words),
        )

    def _composed(self, sampler: str) -> DictConfig:
        return self._chosen(sampler)[1]

    def _chosen(self, sampler: str) -> tuple[list[str], DictConfig]:
        """The words that choose a sampler, and what they compose to.

        An option that the recipe gives its own sampler, and this one does not list, is left out.
        """
        if sampler not in self._known:
            words, listed = [f"sampler={sampler}"], listed_sampler(sampler)
            node = compose([*self.words, *words]).sampler
            foreign = [str(key) for key in node if key not in listed]
            with open_dict(node):
                for key in foreign:
                    del node[key]
            self._known[sampler] = ([*words, *(f"~sampler.{key}" for key in foreign)], node)
        return self._known[sampler]

    def _fitting_samplers(self) -> list[str]:
        """Those that run on this path, this parametrization and this kind of backbone.

        Each is asked to walk a field whose prediction never changes: one call of the network for all of them.
        """
        still = self._still_field()
        x_1 = self._noise()
        fitting = []
        for name in choices("sampler"):
            node = listed_sampler(name)
            if OmegaConf.missing_keys(node):
                continue
            try:
                build(node, "sampler")(still, x_1, SampleRandom(0, [0], device()))
            except UserError:
                continue
            fitting.append(name)
        return fitting

    def _noise(self) -> State:
        return pure_noise(self.generator.latent_shape, SampleRandom(0, [0], device()))

    def _still_field(self) -> StillField:
        seen: list[Output] = []

        def look(field: Field, x_1: State, random: Any, *, trace: Any = None) -> State:
            seen.append(field(x_1, torch.tensor(0.5, dtype=torch.float64)))
            return x_1

        cfg = compose([*self.words, "task.num_samples=1", "guidance=none"])
        wanted = on_device(wanted_labels(cfg, self.assembly), device())
        guidance = build(cfg.guidance, "guidance")
        replace(self.generator, sampler=look, guidance=guidance)(wanted, SampleRandom(0, [0], device()))
        backbone = self.generator.backbone
        return StillField(self.generator.path, self.generator.parametrization, backbone.uses_carry, seen[0])


@dataclass(frozen=True)
class StillField:
    """A field that says the same everywhere: it shows at no cost whether a sampler can walk at all."""

    path: DiffusionPath
    parametrization: Parametrization
    uses_carry: bool
    output: Output

    def during(self, t: Tensor) -> StillField:
        """Itself."""
        return self

    def __call__(self, x_t: State, t: Tensor, carry: Any = None) -> Output:
        """The one output, in the dtype of the trajectory."""
        dtype = latent_of(x_t).dtype
        heads = {name: map_state(lambda x: x.to(dtype), head) for name, head in self.output.heads.items()}
        assert self.output.pred is not None
        return replace(self.output, pred=map_state(lambda x: x.to(dtype), self.output.pred), heads=heads)


def listed_sampler(name: str) -> DictConfig:
    """A choice of the group ``sampler`` as its file has it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF / "sampler")):
        return hydra.compose(name)


def rows(images: Tensor, rounding: str) -> Pictures:
    """Pictures as bytes, rows first."""
    return to_uint8(images, rounding).permute(0, 2, 3, 1).cpu().numpy()


def quoted(text: str) -> str:
    """A text as Hydra's command line reads it; a plain path stays as it is.

    Raises:
        UserError: for what Hydra cannot read back, or would resolve.
    """
    if re.fullmatch(r"[\w.-]*/[\w./-]*", text):
        return text
    if text.endswith("\\") or '\\"' in text or "${" in text:
        raise UserError(f"'{text}': a command line cannot hold ${{, nor a backslash before a quotation mark or the end")
    return '"' + text.replace('"', '\\"') + '"'
