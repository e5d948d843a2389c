"""Captions as the condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.nn.precision import as_input
from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond, TextStates, Tokens


class TextConditioner:
    """One text encoder's states, their mask and, if wanted, its pooled vector; the null condition is the empty prompt.

    A dropped caption becomes the empty prompt (REPA's text-to-image training; in PixArt-alpha's code a learned one).

    Args:
        text_encoders: by name.
        encoder: the one that is read.
        pooled: give the network the pooled vector too.
        drop: probability with which a training sample loses its caption.

    Attributes:
        reads, context_dim, pooled_dim: see the protocol ``Conditioner``.

    Raises:
        UserError: for an encoder that is not there or has no pooled vector; at a call for a batch without captions.
    """

    reads = ("caption",)
    concat_channels = 0

    def __init__(
        self, text_encoders: Mapping[str, TextEncoder], encoder: str = "main", pooled: bool = False, drop: float = 0.1
    ) -> None:
        _check(text_encoders, [encoder], drop)
        self.text_encoders = dict(text_encoders)
        self.encoder = encoder
        self.drop = drop
        self.context_dim: int | None = text_encoders[encoder].spec.dim
        self.pooled_dim = text_encoders[encoder].pooled_dim if pooled else None
        if pooled and self.pooled_dim is None:
            raise UserError(f"conditioner.pooled: text_encoders.{encoder} gives no pooled vector; set its `pooled`")
        self._empty = EmptyPrompts(self.text_encoders)

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        cond = self._cond(states_of(batch, self.encoder, self.text_encoders))
        if not drop or "text" not in drop:
            return cond
        lost = drop["text"]
        assert cond.text is not None
        return cond.where(lost, self.null(len(lost), cond.text.data.device))

    def null(self, batch: int, device: torch.device) -> Cond:
        """The empty prompt for a batch."""
        return self._cond(self._empty(self.encoder, batch, device))

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose their caption: {"text": bool [B]}."""
        return {"text": random.uniform("drop/text") < self.drop}

    def _cond(self, states: TextStates) -> Cond:
        pooled = states.pooled if self.pooled_dim is not None else None
        return Cond(text=Tokens(states.data), text_mask=states.mask, pooled=pooled)


class JoinedTextConditioner:
    """Several text encoders joined as in Stable Diffusion 3 (arXiv:2403.03206, section 4 and appendix B.3).

    context = [channels of the CLIP encoders side by side, padded with zeros | T5's tokens after them], pooled = CLIP's
    vectors side by side; no mask. In training every encoder is set to zero on its own, tokens and vector; the null
    condition of guidance is the empty prompt. An encoder that is left out altogether is an
    :class:`repalign.encoders.text_sd3.AbsentTextEncoder`: zeros, as when it was dropped.

    Args:
        text_encoders: by name.
        side_by_side: names of the CLIP encoders, in order.
        after: name of T5.
        drop: probability with which a training sample loses an encoder (SD3: 0.464, so that 10 % lose all three).

    Attributes:
        reads, context_dim, pooled_dim: see the protocol ``Conditioner``.

    Raises:
        UserError: for an encoder that is not there, CLIP encoders without vectors, of other lengths or wider than T5;
            at a call for a batch without captions.
    """

    reads = ("caption",)
    concat_channels = 0

    def __init__(
        self,
        text_encoders: Mapping[str, TextEncoder],
        side_by_side: Sequence[str] = ("clip_l", "clip_g"),
        after: str = "t5",
        drop: float = 0.464,
    ) -> None:
        _check(text_encoders, [*side_by_side, after], drop)
        self.text_encoders = dict(text_encoders)
        self.side_by_side = tuple(side_by_side)
        self.after = after
        self.drop = drop
        clips = [text_encoders[name] for name in side_by_side]
        without = [name for name in side_by_side if text_encoders[name].pooled_dim is None]
        if without:
            raise UserError(f"conditioner.side_by_side: text_encoders.{without[0]} gives no pooled vector")
        widths, width = [clip.spec.dim for clip in clips], text_encoders[after].spec.dim
        if sum(widths) > width or len({clip.length for clip in clips}) > 1:
            raise UserError(
                f"conditioner: {' + '.join(map(str, widths))} channels of {', '.join(side_by_side)} with "
                f"{', '.join(str(clip.length) for clip in clips)} tokens; expected at most the {width} channels of "
                f"text_encoders.{after}, and one length"
            )
        self.context_dim: int | None = width
        self.pooled_dim: int | None = sum(clip.pooled_dim or 0 for clip in clips)
        self._empty = EmptyPrompts(self.text_encoders)

    @property
    def names(self) -> tuple[str, ...]:
        """All encoders that are read."""
        return (*self.side_by_side, self.after)

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        states = {name: states_of(batch, name, self.text_encoders) for name in self.names}
        for name in self.names:
            lost = None if drop is None else drop.get(f"text/{name}")
            if lost is not None:
                states[name] = keep(states[name], ~lost)
        return self._cond(states)

    def null(self, batch: int, device: torch.device) -> Cond:
        """The empty prompt for a batch."""
        return self._cond({name: self._empty(name, batch, device) for name in self.names})

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose which encoder: {"text/<name>": bool [B]}, independent of each other."""
        return {f"text/{name}": random.uniform(f"drop/text/{name}") < self.drop for name in self.names}

    def _cond(self, states: Mapping[str, TextStates]) -> Cond:
        context, pooled = join_text([states[name] for name in self.side_by_side], states[self.after])
        return Cond(text=Tokens(context), pooled=pooled)


def join_text(clips: Sequence[TextStates], after: TextStates) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"]]:
    """Context and pooled vector: see :class:`JoinedTextConditioner`. N = tokens of a CLIP encoder + those of T5."""
    first = torch.cat([states.data for states in clips], -1)
    first = F.pad(first, (0, after.data.shape[-1] - first.shape[-1]))
    vectors = [states.pooled for states in clips if states.pooled is not None]
    return torch.cat([first, after.data], 1), torch.cat(vectors, -1)


def keep(states: TextStates, kept: Tensor) -> TextStates:
    """Zeros, in tokens and vector, where a sample is not kept; ``kept`` is bool [B]."""
    data = torch.where(kept[:, None, None], states.data, 0)
    return TextStates(
        data, states.mask, None if states.pooled is None else torch.where(kept[:, None], states.pooled, 0)
    )


def states_of(batch: Mapping[str, Any], name: str, text_encoders: Mapping[str, TextEncoder]) -> TextStates:
    """An encoder's states from the batch's cache, or by running it on the captions.

    Raises:
        UserError: when the batch has neither.
    """
    cached = batch.get(f"text/{name}")
    if cached is not None:
        pooled = batch.get(f"text_pooled/{name}")
        return _as_inputs(TextStates(cached, batch[f"text_mask/{name}"].bool(), pooled))
    if "caption" not in batch:
        raise UserError(
            "conditioner: reads captions, and these data have none; choose data with captions (data.caption=COLUMN of "
            "data=parquet), or conditioner=label"
        )
    return _as_inputs(text_encoders[name](batch["caption"]))


def _as_inputs(states: TextStates) -> TextStates:
    return TextStates(as_input(states.data), states.mask, None if states.pooled is None else as_input(states.pooled))


class EmptyPrompts:
    """States of the empty prompt, computed once for each encoder."""

    def __init__(self, text_encoders: Mapping[str, TextEncoder]) -> None:
        self.text_encoders = text_encoders
        self._kept: dict[str, TextStates] = {}

    def __call__(self, name: str, batch: int, device: torch.device) -> TextStates:
        """The states, repeated for a batch."""
        if name not in self._kept:
            self._kept[name] = _as_inputs(self.text_encoders[name]([""]))
        states = self._kept[name]

        def repeat(x: Tensor) -> Tensor:
            return x.to(device).expand(batch, *x.shape[1:])

        pooled = None if states.pooled is None else repeat(states.pooled)
        return TextStates(repeat(states.data), repeat(states.mask), pooled)


def _check(text_encoders: Mapping[str, TextEncoder], names: Sequence[str], drop: float) -> None:
    for name in names:
        if name not in text_encoders:
            if not text_encoders:
                raise UserError(f"text_encoders: none, and the conditioner reads '{name}'; set text_encoder=...")
            raise unknown_choice("conditioner", name, text_encoders, "text encoder")
    if not 0 <= drop <= 1:
        raise UserError(f"conditioner.drop must be in [0, 1], found {drop}")
