"""An audit hook that notes what a hostile file may not do: run, start programs, ask a network, write elsewhere."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAYLOAD = "repalign_canary"  # in every piece of hostile code, so that it is known again
_ALWAYS = (
    "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "os.putenv", "shutil.rmtree",
    "webbrowser.open", "ftplib.connect", "smtplib.connect",
)  # fmt: skip
_PATHS = ("os.remove", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod", "os.rmdir")


@dataclass
class Watch:
    """What happens while a case runs; ``inside`` is where it may write."""

    inside: Path | None = None
    events: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook."""
        if self.inside is None:
            return
        if event in _ALWAYS:
            self.events.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and self._foreign(getattr(arguments[0], "co_filename", "")):
            self.events.append(f"exec {arguments[0].co_filename}")
        elif event == "compile" and (PAYLOAD in str(arguments[0]) or self._foreign(str(arguments[1]))):
            self.events.append(f"compile {arguments!r:.200}")
        elif event == "import" and PAYLOAD in str(arguments[0]):
            self.events.append(f"import {arguments[0]}")
        elif event == "open" and self._writes(arguments) and self._outside(arguments[0]):
            self.events.append(f"write {arguments[0]}")
        elif event in _PATHS and self._outside(arguments[0]):
            self.events.append(f"{event} {arguments[0]}")

    def _foreign(self, file: str) -> bool:
        return PAYLOAD in file or (self.inside is not None and file.startswith(str(self.inside)))

    @staticmethod
    def _writes(arguments: tuple[Any, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        if isinstance(mode, str):
            return any(letter in mode for letter in "wax+")
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _outside(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        place = os.path.realpath(os.fsdecode(path))
        return place != "/dev/null" and not place.startswith(str(self.inside)) and "__pycache__" not in place


def installed() -> Watch:
    """The hook, which stays for the life of the process."""
    watch = Watch()
    sys.addaudithook(watch)
    return watch
