"""Several scores over one pass of a feature network, or of several networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.features import FeatureNetwork, Features, to_uint8
from repalign.metrics.intervals import half_width
from repalign.metrics.reference import Reference

GROUPS = 10  # of which an interval draws halves


class Score(Protocol):
    """A number of the generated pictures' statistics, perhaps against a reference's. It keeps nothing.

    ``needs`` and ``needs_reference`` name what it reads of the two sides (:mod:`repalign.metrics.drawn`).
    """

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def needs_reference(self) -> frozenset[str]: ...
    def __call__(self, drawn: Drawn, reference: Reference) -> tuple[float, float | None]: ...  # value, spread


class FeatureMetrics:
    """Scores by name over one feature network: the network runs once per picture. Keeps protocol ``Metric``.

    Pictures are rounded to bytes first, so that scoring in memory and scoring the saved files give the same numbers.
    The network sees them in portions of one size, whatever the batches that come in, so that its rounding does not
    depend on the batch either. Sums are in float64 on the CPU.

    Args:
        network: gives features, and perhaps logits and a spatial map.
        scores: name -> score. The name says which network it is (``fd_lite0``); ``fid`` is Inception's alone.
        chunk: pictures that the network sees at once.
        draws: random halves of the pictures for the 95 % intervals; 0 for no interval. Each costs every score again.

    Attributes:
        reference: what the pictures are compared with.
        captions: of the generated pictures by serial number, for scores that need ``text``; set by the owner.
    """

    def __init__(self, network: FeatureNetwork, scores: Mapping[str, Score], chunk: int = 64, draws: int = 0) -> None:
        if chunk < 1 or draws < 0:
            raise UserError(f"metric: chunk must be 1 or more and draws 0 or more, found {chunk} and {draws}")
        self.network = network
        self.scores = dict(scores)
        self.chunk = chunk
        self.draws = draws
        self.reference: Reference | None = None
        self.captions: Sequence[str] | None = None
        self._device = torch.device("cpu")
        self.reset()

    @property
    def count(self) -> int:
        """Generated pictures so far."""
        return self._count

    @property
    def fingerprint(self) -> str:
        """Of the network: weights and preprocessing."""
        return self.network.fingerprint

    @property
    def reads_captions(self) -> bool:
        """Whether a score compares pictures with their captions."""
        return any("text" in score.needs for score in self.scores.values())

    @property
    def reads_reference(self) -> bool:
        """False where captions stand for real pictures."""
        return not self.reads_captions or any(score.needs_reference for score in self.scores.values())

    def to(self, device: torch.device) -> FeatureMetrics:
        """Move the network; sums stay on the CPU in float64."""
        self.network.to(device)
        self._device = device
        return self

    def set_reference(self, reference: Reference) -> None:
        """Compare with these statistics.

        Raises:
            UserError: when a score reads what the reference does not hold.
        """
        for name, score in self.scores.items():
            if missing := score.needs_reference - reference.holds:
                raise UserError(
                    f"reference: '{reference.fingerprint}' holds {' and '.join(sorted(reference.holds))} alone; {name} "
                    f"needs {', '.join(sorted(missing))}: take the pictures themselves as reference, or leave this "
                    f"score out (~metric.scores.{name})"
                )
        self.reference = reference

    def prepare(
        self,
        batches: Callable[[], Iterable[Tensor]],
        fingerprint: str,
        folder: Path,
        moments: Reference | None = None,
    ) -> Reference:
        """Compare with these pictures; their statistics are measured once and kept in ``folder``.

        Args:
            batches: gives the real pictures [B, 3, H, W] in [0, 1]; called only when nothing is kept yet.
            fingerprint: of the pictures.
            folder: of the kept statistics.
            moments: published moments that are to stand instead of the measured ones; the pictures then give the
                features alone, as the ADM evaluator has it.
        """
        identity = f"{self.fingerprint}/{fingerprint}"
        file = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        if file.exists():
            reference = Reference.load(file)
        else:
            reference = Reference.measure(self._features, _portions(batches(), self.chunk), identity)
            reference.save(file)
        self.set_reference(reference if moments is None else replace(moments, features=reference.features))
        return reference

    def _features(self, images: Tensor) -> Features:
        return self._seen(to_uint8(images))

    def _seen(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Features:
        """Always ``chunk`` pictures at once; the last portion is filled up and cut again."""
        parts: list[Features] = []
        for part in pictures.split(self.chunk):
            padding = part[-1:].expand(self.chunk - len(part), -1, -1, -1)
            with torch.no_grad():
                seen = Features(*self.network(torch.cat([part, padding]).to(self._device).float() / 255))
            parts.append(Features(*map(partial(_first, count=len(part)), seen)))
        return Features(*map(_joined, zip(*parts, strict=True)))

    def update(self, images: Float[Tensor, "b 3 h w"], serials: Int[Tensor, " b"] | None = None) -> None:
        """Add generated pictures in [0, 1].

        Args:
            images: any number of them.
            serials: their serial numbers; None: they are counted. Processes that share the work must give them.
        """
        first = self._count
        serials = torch.arange(first, first + len(images)) if serials is None else serials.cpu()
        self._count += len(images)
        self._pending.append((serials, to_uint8(images).cpu()))
        if sum(len(waiting) for waiting, _ in self._pending) >= self.chunk:
            self._look(whole=False)

    def _look(self, whole: bool) -> None:
        """Pass waiting pictures through the network: full portions, or all that there are."""
        if not self._pending:
            return
        serials, pictures = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        ready = len(serials) if whole else len(serials) // self.chunk * self.chunk
        if ready:
            seen = self._seen(pictures[:ready])
            self._drawn.add(serials[:ready], self._with_text(seen, serials[:ready]))
        self._pending = [(serials[ready:], pictures[ready:])] if ready < len(serials) else []

    def _with_text(self, seen: Features, serials: Int[Tensor, " b"]) -> Features:
        """With the embeddings of the captions, in portions of one size too."""
        if not self.reads_captions:
            return seen
        if self.captions is None:
            raise UserError(
                f"metric: {', '.join(self.scores)} compares pictures with their captions, and these have none: they "
                "were drawn by class, or no captions.json lies beside them (task.prompts_file names a file)"
            )
        wanted = [self.captions[serial] for serial in serials.tolist()]
        padded = [*wanted, *wanted[-1:] * (-len(wanted) % self.chunk)]
        parts = [self.network.texts(padded[i : i + self.chunk]) for i in range(0, len(padded), self.chunk)]  # type: ignore[attr-defined]  # of a score that needs text
        return seen._replace(text=torch.cat(parts)[: len(wanted)].cpu())

    def gather(self) -> None:
        """Bring together what the processes of ``torch.distributed`` have scored; every one of them must call it."""
        self._look(whole=True)
        self._drawn.gather(self._device)
        self._count = self._drawn.count

    def compute(self) -> dict[str, float]:
        """Every score by name.

        Where it is a mean over parts, ``<name>_std`` is the deviation between them; with ``draws``, ``<name>_ci95`` is
        half the width of its 95 % interval, left out where half of the pictures are too few for the score.

        Raises:
            UserError: when a score needs a reference and none was given, or more pictures.
        """
        self._look(whole=True)
        values: dict[str, float] = {}
        for name, score in self.scores.items():
            if score.needs_reference and self.reference is None:
                raise UserError(f"metric: {name} needs reference pictures; none were given")
            values[name], spread = score(self._drawn, self.reference)  # type: ignore[arg-type]  # checked above
            if spread is not None:
                values[f"{name}_std"] = spread
            if self.draws and (interval := self._interval(score)) is not None:
                values[f"{name}_ci95"] = interval
        return values

    def _interval(self, score: Score) -> float | None:
        """None where the score of all pictures can be taken and that of a half of them cannot."""
        try:
            return half_width(lambda part: score(part, self.reference)[0], self._drawn, self.draws)  # type: ignore[arg-type]
        except UserError:
            return None

    def reset(self) -> None:
        """Forget the generated pictures; the reference stays."""
        needs = frozenset[str]().union(*(score.needs for score in self.scores.values()))
        self._count = 0
        self._drawn = Drawn(needs, GROUPS if self.draws else 1)
        self._pending: list[tuple[Tensor, Tensor]] = []


def _portions(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same pictures cut anew: full portions, then what is left."""
    waiting = torch.empty(0)
    for batch in batches:
        waiting = torch.cat([waiting, batch]) if len(waiting) else batch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


def _first(values: Tensor | None, count: int) -> Any:
    return None if values is None else values[:count].cpu()


def _joined(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else torch.cat(list(parts))


class SeveralFeatures:
    """Scores in several feature spaces over one pass of the pictures. Keeps protocol ``Metric``.

    Args:
        spaces: name -> scores over one network. Names of scores must differ over all of them.

    Raises:
        UserError: when two scores have one name.
    """

    def __init__(self, spaces: Mapping[str, FeatureMetrics]) -> None:
        self.spaces = dict(spaces)
        names = [name for metrics in self.spaces.values() for name in metrics.scores]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"metric.spaces: two scores are called {twice[0]}; give each feature space its own names")

    @property
    def count(self) -> int:
        """Generated pictures so far."""
        return next(iter(self.spaces.values())).count

    def update(self, images: Float[Tensor, "b 3 h w"], serials: Int[Tensor, " b"] | None = None) -> None:
        """Add generated pictures in [0, 1]."""
        for metrics in self.spaces.values():
            metrics.update(images, serials)

    def compute(self) -> dict[str, float]:
        """Every score by name."""
        return {name: value for metrics in self.spaces.values() for name, value in metrics.compute().items()}

    def reset(self) -> None:
        """Forget the generated pictures; the references stay."""
        for metrics in self.spaces.values():
            metrics.reset()


def spaces_of(metrics: FeatureMetrics | SeveralFeatures) -> dict[str, FeatureMetrics]:
    """The feature spaces by name; of one alone, under the name 'main'."""
    return metrics.spaces if isinstance(metrics, SeveralFeatures) else {"main": metrics}
