"""Several captions per picture, original and synthetic: which one a sample is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from datamodules.cache import short
from datamodules.encoded import NO_CLASS
from datamodules.source import PictureSource
from datamodules.texts import LazyTexts
from repalign.errors import UserError
from repalign.random import SampleRandom

Sets = tuple[Sequence[str], Sequence[str]]  # original captions, synthetic ones


class CaptionedSource(PictureSource, Protocol):
    """Pictures with any number of captions each."""

    @property
    def caption_options(self) -> str:
        """Where captions are read from: other options are other captions of the same pictures."""
        ...

    def caption_sets(self, index: int) -> Sets:
        """The original and the synthetic captions of a picture; at least one."""
        ...


class CaptionMix:
    """Chooses a caption for every sample: with probability p an original one, else a synthetic; then any of its kind.

    A picture without captions of the chosen kind takes one of the other. The choice is a function of (seed, serial
    number): SD3 trains on half original and half synthetic captions (arXiv:2403.03206, section 5.2.1, p = 0.5).

    Args:
        source: the pictures with their captions.
        original: p.
        seed: of the choice.

    Raises:
        UserError: when p is outside [0, 1].
    """

    def __init__(self, source: CaptionedSource, original: float, seed: int) -> None:
        if not 0 <= original <= 1:
            raise UserError(f"data.original: expected a probability from 0 to 1, found {original}")
        self.source = source
        self.original = original
        self.seed = seed

    def texts(self, serial: np.ndarray, index: np.ndarray) -> list[str]:
        """The chosen captions of a batch."""
        return [_joined(sets)[place] for sets, place in self._chosen(serial, index)]

    def rows(self, serial: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Their rows in :attr:`all`, int64 [B]."""
        places = [place for _, place in self._chosen(serial, index)]
        return self.all.starts[index] + np.array(places, dtype=np.int64)

    @cached_property
    def all(self) -> AllCaptions:
        """Every caption of every picture; counting them reads each once."""
        return AllCaptions(self.source)

    def _chosen(self, serial: np.ndarray, index: np.ndarray) -> list[tuple[Sets, int]]:
        random = SampleRandom(self.seed, serial.tolist())
        kinds, whiches = random.uniform("caption/kind").tolist(), random.uniform("caption/which").tolist()
        found = []
        for i, kind, which in zip(index.tolist(), kinds, whiches, strict=True):
            original, synthetic = sets = self.source.caption_sets(i)
            takes_original = bool(original) and (kind < self.original or not synthetic)
            pool = len(original) if takes_original else len(synthetic)
            found.append((sets, int(which * pool) + (0 if takes_original else len(original))))
        return found


class AllCaptions:
    """All captions of a set of pictures as if each were a picture: what a store of text features has a row for.

    Args:
        source: the pictures; a picture's captions follow each other, original before synthetic.

    Attributes:
        starts: row of the first caption of every picture, int64 [N].
        captions: the texts, one per row.
    """

    has_images = False
    class_names = NO_CLASS

    def __init__(self, source: CaptionedSource) -> None:
        counts = np.array([sum(map(len, source.caption_sets(i))) for i in range(len(source))], dtype=np.int64)
        self._source = source
        self.starts = np.cumsum(counts) - counts
        self.labels = np.zeros(int(counts.sum()), dtype=np.int64)
        self.captions: Sequence[str] | None = _Flat(source, self.starts, len(self.labels))
        self.image_size = source.image_size
        self.fingerprint = f"{source.fingerprint}-{short(source.caption_options)}"
        self.attribution = source.attribution

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """There are no pictures here."""
        raise NotImplementedError("captions alone")


class _Flat(LazyTexts):
    """The texts of :class:`AllCaptions`, read when they are asked for."""

    def __init__(self, source: CaptionedSource, starts: np.ndarray, total: int) -> None:
        self._source, self._starts, self._total = source, starts, total

    def __len__(self) -> int:
        return self._total

    def text(self, index: int) -> str:
        """One of them."""
        picture = int(np.searchsorted(self._starts, index, side="right")) - 1
        return _joined(self._source.caption_sets(picture))[index - int(self._starts[picture])]


class FirstCaptions(LazyTexts):
    """One caption per picture, the first: for previews and for stores of latents."""

    def __init__(self, source: CaptionedSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def text(self, index: int) -> str:
        """One of them."""
        return _joined(self._source.caption_sets(index))[0]


def texts_in(value: object, what: str) -> list[str]:
    """Captions in a value of a JSON or Parquet field: a text, a list of texts, or nothing; blank ones are left out.

    Raises:
        UserError: for anything else, naming ``what``.
    """
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise UserError(f"{what}: expected a text or a list of texts, found {str(value)[:40]!r}")
    return [text.strip() for text in values if text.strip()]


def _joined(sets: Sets) -> list[str]:
    return [*sets[0], *sets[1]]
