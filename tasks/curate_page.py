"""What the page of ``task=curate`` shows, as plain values for its template."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from callbacks.pictures import evenly_spaced
from datamodules.curated import Decision, names_of, whole_picture
from datamodules.encoded import UnreadableImage
from datamodules.images import to_picture
from datamodules.source import PictureSource

_SIDE = 112  # of a picture on the page
_MOST_COPIES = 7  # of a group


def curation_page(
    source: PictureSource, decisions: Sequence[Decision], steps: Sequence[Mapping[str, Any]], shown: int
) -> dict[str, Any]:
    """Values of ``templates/curate.html``.

    Args:
        source: the pictures.
        decisions: about all of them.
        steps: name, number removed and options of each, in order.
        shown: pictures of a step, and groups of copies, at most.
    """
    rows = {name: row for row, name in enumerate(names_of(source))}
    left, table = len(decisions), []
    for step in steps:
        left -= step["removed"]
        share = f"{100 * step['removed'] / len(decisions):.1f} %"
        table.append({"name": step["name"], "removed": step["removed"], "share": share, "left": left})
    groups: dict[str, list[Decision]] = {}
    for one in decisions:
        if one.copy_of is not None:
            groups.setdefault(one.copy_of, []).append(one)
    largest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))[:shown]
    alone = [one for one in decisions if one.step is not None and one.copy_of is None]
    return {
        "kind": "curation",
        "title": source.fingerprint,
        "count": len(decisions),
        "kept": left,
        "table": table,
        "group_count": len(groups),
        "groups": [
            [_figure(source, rows, name, "kept"), *(_removed(source, rows, one) for one in copies[:_MOST_COPIES])]
            for name, copies in largest
        ],
        "removed": [
            {"name": step["name"], "figures": [_removed(source, rows, one) for one in some]}
            for step in steps
            if (some := _spread([one for one in alone if one.step == step["name"]], shown))
        ],
        "stayed": [
            _figure(source, rows, one.name, "")
            for one in _spread([one for one in decisions if one.step is None], 2 * shown)
        ],
        "attribution": source.attribution,
    }


def _spread(found: Sequence[Decision], most: int) -> list[Decision]:
    return [found[place] for place in evenly_spaced(min(most, len(found)), len(found))]


def _removed(source: PictureSource, rows: Mapping[str, int], one: Decision) -> dict[str, str]:
    reason = one.reason or ""
    if one.copy_of is not None:
        reason = reason.rpartition(", ")[2]  # the picture beside it says of what
    return _figure(source, rows, one.name, reason)


def _figure(source: PictureSource, rows: Mapping[str, int], name: str, reason: str) -> dict[str, str]:
    return {"source": _thumbnail(source, rows[name]), "name": name, "reason": reason}


def _thumbnail(source: PictureSource, row: int) -> str:
    """A small PNG inside the page; empty for a picture that cannot be read."""
    try:
        pixels: np.ndarray = whole_picture(source, row)
    except UnreadableImage:
        return ""
    picture = to_picture(torch.from_numpy(pixels))
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
