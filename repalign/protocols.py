"""The protocols that every part of the house keeps. Read this file first; the records are in :mod:`repalign.state`.

Three ideas carry everything: the backbone draws nothing at random (times, noise and dropped conditions come in);
hidden states are asked for by name; a state may have several named streams and still adds and scales like a tensor.
Every loss is [B]; the mean over the batch is taken once, in :mod:`repalign.training.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from repalign.state import (
    Coefficients,
    Cond,
    Draw,
    Gaussian,
    Output,
    PathSample,
    State,
    Step,
    TextStates,
    Tokens,
    TokenSpec,
)


class Randomness(Protocol):
    """Named random streams, one per sample (:class:`repalign.random.SampleRandom`; recorded draws in golden tests)."""

    @property
    def batch(self) -> int: ...
    def at(self, stage: int) -> Randomness: ...
    def uniform(self, name: str) -> Tensor: ...  # [B] in [0, 1)
    def integers(self, name: str, low: int, high: int) -> Tensor: ...  # [B] in [low, high)
    def normal(self, name: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor: ...
    def normal_like(self, name: str, state: State) -> State: ...


class Backbone(Protocol):
    """A network that predicts from a noisy state: a function of its inputs and nothing else.

    ``tap_specs`` names the hidden states on offer: ``block.8`` is the output of the 8th block (1-based, as papers
    print it), ``encoder.8``, ``mid``, ``block.8/text``. ``uses_carry`` says that the output holds a ``carry`` which
    makes a later call cheaper (DDT's shared encoder, a key-value cache); a batch then may not change its size.
    A deeply supervised network takes a time for each of its K branches and says so by an attribute ``branches``; one
    without the attribute has a single branch. Which times a network takes is its attribute ``times``, some of
    ``sample``, ``branch`` and ``group`` (:class:`Objective`); one without the attribute takes one time a sample.
    An attribute ``units`` lists its blocks, which hold most of the weights and run one after another: what is
    recomputed, compiled and sharded one by one (:func:`repalign.training.policies.units_of`).
    """

    tap_specs: Mapping[str, TokenSpec]
    uses_carry: bool

    def __call__(
        self,
        x_t: State,
        t: Tensor | None,  # [B], [B, K], or [B, N] for a time of each token
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,  # stop after the last tap that is wanted
        carry: Any = None,
    ) -> Output: ...


class TokenIO(Protocol):
    """Inside a transformer backbone: how the streams of a state become tokens and come back (an ``nn.Module``)."""

    grid: tuple[int, int]
    prefix: int

    def positions(self) -> Tensor: ...  # fixed, [1, prefix + N, D]
    def reset_parameters(self) -> None: ...  # initial weights of its own layers
    def embed(self, x_t: Any) -> Tensor: ...  # the streams it was made for -> [B, prefix + N, D]
    def unembed(self, tokens: Tensor) -> tuple[State, Mapping[str, State]]: ...  # -> pred, heads


class Path(Protocol):
    """The interpolant between data (t = 0) and noise (t = 1)."""

    @property
    def singular_at_data(self) -> bool: ...  # whether coefficients diverge at t = 0 (VP)
    def coefficients(self, t: Tensor) -> Coefficients: ...
    def sample(self, x_0: State, eps: State, t: Tensor) -> PathSample: ...


class Parametrization(Protocol):
    """What the network predicts, and how that converts to the three other quantities."""

    @property
    def divides(self) -> bool: ...  # whether its conversions divide by a coefficient that vanishes at an end
    def target(self, sample: PathSample) -> State: ...
    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State: ...
    def data(self, pred: State, x_t: State, c: Coefficients) -> State: ...
    def noise(self, pred: State, x_t: State, c: Coefficients) -> State: ...
    def score(self, pred: State, x_t: State, c: Coefficients) -> State: ...


class TimeSampler(Protocol):
    """Times for training, [B] (a ladder: [B, K])."""

    def __call__(self, random: Randomness) -> Tensor: ...


class Objective(Protocol):
    """A training loss: it makes the draw, then calls the backbone, once or many times.

    Its attribute ``times`` says what its draw's t is: ``sample`` [B], the default; ``branch`` [B, K], one for each
    branch of the backbone; ``group`` [B, K], one for each group of tokens.
    """

    def draw(self, x_0: State, random: Randomness) -> Draw: ...
    def __call__(
        self,
        backbone: Backbone,
        x_0: State,
        cond: Cond,
        draw: Draw,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
    ) -> Step: ...


class Encoder(Protocol):
    """A frozen representation with its own preprocessing: images [B, 3, H, W] in [0, 1] -> tokens."""

    spec: TokenSpec

    def __call__(self, images: Tensor) -> Tokens: ...


class TextEncoder(Protocol):
    """A frozen language model with its own tokenizer: captions -> token states, mask and perhaps a pooled vector."""

    spec: TokenSpec
    length: int  # tokens per caption
    pooled_dim: int | None  # width of the pooled vector
    fingerprint: str  # changes with weights, tokenizer and options: the name under which states may be stored

    def __call__(self, captions: Sequence[str]) -> TextStates: ...


class StreamSource(Protocol):
    """A further stream of x_0 beside the latent, made from an encoder's tokens of the clean image."""

    encoder: str  # name of the encoder
    shape: tuple[int, ...]  # without the batch

    def __call__(self, tokens: Tokens) -> Tensor: ...  # -> [B, *shape], on a scale that suits unit noise


class LatentNorm(Protocol):
    """Between raw latents (stored) and normalised latents (diffused)."""

    def normalize(self, raw: State) -> State: ...
    def denormalize(self, latent: State) -> State: ...


class Autoencoder(Protocol):
    """Images to raw latents and back; ``norm`` is None where nobody has measured the latents."""

    norm: LatentNorm | None
    downsampling: int
    channels: int

    def encode(self, images: Tensor) -> Gaussian: ...  # [B, 3, H, W] in [0, 1]
    def decode(self, raw: State) -> Tensor: ...  # -> [B, 3, H, W] in [0, 1], clamped


class Conditioner(Protocol):
    """From a batch to the backbone's conditions, and the null condition that guidance uses.

    ``drop`` says which samples lose which condition (what :meth:`draw_drop` draws); names that are not the
    conditioner's are other parts' business. A condition without a null is absent in :meth:`null` and stays under
    guidance. A conditioner with weights of its own is an ``nn.Module``; they are trained with the network.
    """

    @property
    def reads(self) -> Collection[str]: ...  # of a batch: label, caption, size, image, boxes, segmentation
    @property
    def text_encoders(self) -> Mapping[str, TextEncoder]: ...  # the frozen ones that it runs
    @property
    def context_dim(self) -> int | None: ...  # width of Cond.text; None when there is none
    @property
    def pooled_dim(self) -> int | None: ...  # width of Cond.pooled; None when there is none
    @property
    def concat_channels(self) -> int: ...  # of Cond.spatial; 0 when there is none
    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond: ...
    def null(self, batch: int, device: torch.device) -> Cond: ...
    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]: ...  # name -> bool [B]


class Target(Protocol):
    """What a tap is aligned with: tokens of an encoder, a teacher, another tap or view. Detached unless it says so."""

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec: ...
    def __call__(self, context: Context) -> Tokens: ...


class Similarity(Protocol):
    """A loss between student and target tokens of the same shape: [B, N, D] x [B, N, D] -> [B]."""

    def __call__(self, student: Tensor, target: Tensor) -> Tensor: ...


class Aligner(Protocol):
    """One alignment term: tap x target x head x similarities -> [B]."""

    taps: Collection[str]
    weight: float | Callable[[int], float]  # a schedule is called with the number of finished steps

    def __call__(self, context: Context) -> Tensor: ...


class Context(Protocol):
    """What an aligner may read of the step (:class:`repalign.training.step.StepContext`)."""

    images: Tensor | None
    x_0: State
    cond: Cond
    draw: Draw
    step: Step
    backbone: Backbone
    teacher: Backbone | None  # the average of the backbone's weights
    random: Randomness | None

    def undropped(self) -> Cond: ...  # the conditions before any was dropped
    def features(self, encoder: str) -> Tokens: ...  # computed at most once a step, or read from the cache


class Field(Protocol):
    """A backbone with its path, parametrization and condition bound: what a sampler integrates. Guidance nests."""

    @property
    def path(self) -> Path: ...
    @property
    def parametrization(self) -> Parametrization: ...
    @property
    def uses_carry(self) -> bool: ...
    def during(self, t: Tensor) -> Field: ...  # for a whole step that begins at t: decides about guidance once
    # t: scalar tensor; carry: of an earlier call, ``samplers.field.ANEW`` to keep this one's, None to keep nothing
    def __call__(self, x_t: State, t: Tensor, carry: Any = None) -> Output: ...


class Guidance(Protocol):
    """Makes a guided field from a conditional and an unconditional one."""

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field: ...


@runtime_checkable
class Sampler(Protocol):
    """Integrates a field from noise (t = 1) to data (t = 0)."""

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State: ...


class Metric(Protocol):
    """Compares generated images with a reference."""

    def update(self, images: Tensor) -> None: ...  # [B, 3, H, W] in [0, 1]
    def compute(self) -> Mapping[str, float]: ...
    def reset(self) -> None: ...
