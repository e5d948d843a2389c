"""A headless Chromium, driven over its debugging protocol: what a page asks for, clicks, screenshots.

The program is ``$CHROMIUM``, or the first of the usual names on the path.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: set CHROMIUM=PROGRAM, or put it on the path")


class Page:
    """One tab: ``requests`` holds the URL of everything that it asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.numbers = socket, itertools.count(1)
        self.requests: list[str] = []

    async def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; events that come before its answer are noted."""
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=240)).data)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = await self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 240) -> None:
        """Wait for an expression to hold."""
        end = time.monotonic() + seconds
        while not await self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            await asyncio.sleep(0.2)

    async def picture(self, file: Path, width: int, height: int | None = None) -> None:
        """A screenshot at a width; of the whole page when no height is given."""
        await self.size(width, height or 100)
        if height is None:
            await asyncio.sleep(0.5)
            await self.size(width, int(await self.value("document.documentElement.scrollHeight")))
        await asyncio.sleep(0.5)
        shot = await self.tell("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    async def size(self, width: int, height: int) -> None:
        """The size of the window."""
        await self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )


def drive(url: str, steps: Callable[[Page], Awaitable[None]], seconds: float = 480) -> list[str]:
    """Open a page, do something with it, and give what it asked for."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = "--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-port=0".split()
        process = subprocess.Popen(
            [PROGRAM, *words, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return asyncio.run(asyncio.wait_for(_drive(Path(profile), url, steps), seconds))
        finally:
            process.terminate()
            process.wait(20)


async def _drive(profile: Path, url: str, steps: Callable[[Page], Awaitable[None]]) -> list[str]:
    file = profile / "DevToolsActivePort"
    while not file.exists() or "\n" not in file.read_text():
        await asyncio.sleep(0.1)
    port = file.read_text().split()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(tab for tab in await answer.json() if tab["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=2**28) as socket:
            page = Page(socket)
            for domain in ("Page", "Network", "Runtime"):
                await page.tell(f"{domain}.enable")
            await page.tell("Page.navigate", url=url)
            await page.until("document.readyState == 'complete' && location.href != 'about:blank'")
            await steps(page)
            return page.requests
