"""task=play: a page on this machine that draws pictures with the weights of a checkpoint."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from repalign.errors import UserError
from tasks.player import Player
from tasks.sample import find_weights, restored

HOST = "127.0.0.1"


def run(cfg: DictConfig) -> None:
    """Open the page and serve it until the process is interrupted.

    Raises:
        UserError: one line for a missing package, a port that is taken, a missing checkpoint; before the weights are
            read.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("task=play: gradio is not installed; pip install 'repalign[play]'")
    check_port(cfg.task.port)
    find_weights(cfg.task.checkpoint, Path(cfg.run_dir))
    if cfg.task.frames < 1:
        raise UserError(f"task.frames: found {cfg.task.frames}, expected 1 or more")
    assembly, generator, checkpoint = restored(cfg)
    player = Player(list(cfg.overrides), assembly, generator, checkpoint, cfg.task.frames)
    # No report of use to anybody, no version check, no fonts or scripts from elsewhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio looks at its own page when it starts
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop tidies up as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="repalign-play-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from tasks.play_page import serve

        serve(player, HOST, cfg.task.port, cfg.task.browser)


def check_port(port: int) -> None:
    """The port is free.

    Raises:
        UserError: when it is not, or is no port.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"task.port: found {port}, expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"task.port: {port} cannot be used ({error.strerror}); set task.port=...") from error
