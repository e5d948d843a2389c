"""Checkouts of official repositories, one file for each kind: their model and loss beside ours (task=benchmark)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_modules.diffusion import DiffusionModule
from repalign.errors import UserError
from tasks.peers import ddt, repa, sit
from tasks.peers.peer import Peer

# A kind is known by its files: (repository, files that it has, what makes the peer).
KINDS: Mapping[str, tuple[tuple[str, ...], Callable[[Path, DiffusionModule], Peer]]] = {
    "sihyun-yu/REPA": (repa.FILES, repa.make),
    "willisma/SiT": (sit.FILES, sit.make),
    "MCG-NJU/DDT": (ddt.FILES, ddt.make),
}


def peer_of(path: Path, module: DiffusionModule) -> Peer:
    """The peer in a checkout, of the composition's sizes and with its weights. Runs code of the checkout.

    Raises:
        UserError: for a path that is no such checkout, or a composition that the official code does not train.
    """
    peer = kind_of(path)(path, module)
    peer.take_weights(module)
    return peer


def kind_of(path: Path) -> Callable[[Path, DiffusionModule], Peer]:
    """What makes the peer of a checkout; nothing is imported yet.

    Raises:
        UserError: when the files are those of no kind.
    """
    if not path.is_dir():
        raise UserError(f"task.peer: no folder '{path}'; give the checkout of one of {', '.join(KINDS)}")
    for files, make in KINDS.values():
        if all((path / file).is_file() for file in files):
            return make
    known = "; ".join(f"{name} has {' and '.join(files)}" for name, (files, _) in KINDS.items())
    raise UserError(f"task.peer: '{path}' is no checkout of a known repository ({known})")
