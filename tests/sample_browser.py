"""Headless Chromium by its own protocol, over two pipes: no driver has to be installed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Chromium reads from 3 and writes to 4.
_START = """
import os, sys
reads, writes = (os.dup(int(handle)) for handle in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
for handle in (3, 4):
    os.set_inheritable(handle, True)  # it was that number before, perhaps
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page in headless Chromium.

    Attributes:
        messages: What was written on the console, and what the browser complained of.
        requests: URLs that were asked for.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        self._number, self._session, self._buffer = 0, "", b""
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START, str(commands), str(events), CHROMIUM,
             "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=[commands, events], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(events)
        self._watchdog = threading.Timer(120, self._process.kill)  # its pipe then ends
        self._watchdog.start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.wait()
        for handle in (self._commands, self._events):
            with contextlib.suppress(OSError):
                os.close(handle)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._events, 1 << 16)
            assert part, "Chromium ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))

    def run(self, code: str) -> Any:
        """Run an expression in the page, wait for what it promises, and return its value."""
        result = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        """Open a page and wait until it is whole."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._read())
        assert self.run("location.href") == url

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true in the page."""
        self.run(
            "new Promise((done) => { const look = () => (" + condition + ") ? done() : "
            "requestAnimationFrame(look); look(); })"
        )

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files in an input, as a person does."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector('{selector}')")
        self.call(
            "DOM.setFileInputFiles", objectId=found["result"]["objectId"],
            files=[str(file) for file in files],
        )  # fmt: skip

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, which types a text, and let it go."""
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                **({"text": text} if kind == "keyDown" else {}),
            )  # fmt: skip

    def look(self, file: Path, width: int, *, dark: bool = False) -> None:
        """Write a picture of the whole page."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        data = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1},
        )["data"]  # fmt: skip
        file.write_bytes(base64.b64decode(data))
