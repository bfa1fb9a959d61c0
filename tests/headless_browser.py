"""A headless Chromium that a test drives over a pipe: one start for many checks, no other library.

It speaks the DevTools protocol, JSON objects that end with a zero byte, on file descriptors 3 and
4 (``--remote-debugging-pipe``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

AXE = Path(
    os.environ.get("AXE_CORE")
    or Path(__file__).resolve().parents[1] / "node_modules/axe-core/axe.min.js"
)
"""axe-core, which checks accessibility; tests/README.md says how to get it."""

_SECONDS = 120.0  # nothing takes this long unless it hangs


def _above_9(descriptor: int) -> int:
    """Return another number of a file, so that 3 and 4 are free, and close the first."""
    other = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return other


class Browser:
    """A browser with one page."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        folder.parent.mkdir(exist_ok=True)
        to_read, self._to_write = map(_above_9, os.pipe())
        self._to_read, to_write = map(_above_9, os.pipe())
        # Chromium wants 3 and 4, which may be taken here: a shell moves them.
        command = [
            "bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', CHROMIUM,
            "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        with (folder.parent / f"{folder.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, pass_fds=(to_read, to_write)
            )
        os.close(to_read)
        os.close(to_write)
        self._number, self._buffer, self._events = 0, b"", list[dict[str, Any]]()
        self._session: str | None = None
        self._own = ""
        targets = self.send("Target.getTargets")["targetInfos"]
        (target,) = [each["targetId"] for each in targets if each["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.send("Browser.close")
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to_write)
        os.close(self._to_read)

    def send(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._to_write, data) :]
        number = self._number
        for message in self._receive():
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
        raise AssertionError(f"{method}: no answer")

    def _receive(self) -> Iterator[dict[str, Any]]:
        """Yield messages as they come; events are kept."""
        end = time.monotonic() + _SECONDS
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                message = json.loads(line)
                if "method" in message:
                    self._events.append(message)
                yield message
            ready, _, _ = select.select([self._to_read], [], [], max(end - time.monotonic(), 0))
            assert ready, "Chromium does not answer"
            data = os.read(self._to_read, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data

    def open(
        self, page: Path | str, anchor: str = "", *, width: int = 1280, dark: bool = False,
        script: bool = True,
    ) -> None:  # fmt: skip
        """Open a file or a URL, and wait until it is loaded."""
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.resize(width)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="", features=[scheme])
        self._own = page if isinstance(page, str) else page.as_uri()
        address = self._own + (f"#{quote(anchor, safe='=&')}" if anchor else "")
        for url in ("about:blank", address):  # else another anchor would load nothing
            self._events.clear()
            found = self.send("Page.navigate", url=url)
            assert "errorText" not in found, found
            self._wait_for("Page.loadEventFired")
        if script:
            assert self.run("location.href") == address

    def _wait_for(self, event: str) -> None:
        if any(each["method"] == event for each in self._events):
            return
        for message in self._receive():
            if message.get("method") == event:
                return

    def run(self, script: str) -> Any:
        """Return the value of JavaScript in the page, a promise's included."""
        found = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true in the page."""
        self.run(
            "new Promise((done) => { const look = () => (" + condition + ") ? done() : "
            "requestAnimationFrame(look); look(); })"
        )

    def violations(self) -> list[list[str]]:
        """Return what axe-core finds wrong with the page: rule, impact and an element of each."""
        self.run(AXE.read_text("utf-8") + ";0")
        found = self.run(
            "axe.run(document).then((found) => ({bad: found.violations.map((each) =>"
            " [each.id, each.impact, each.nodes[0].html]), passed: found.passes.length}))"
        )
        assert found["passed"] > 10
        bad: list[list[str]] = found["bad"]
        return bad

    def choose_files(self, selector: str, *files: Path) -> None:
        """Choose files in an input, as a person does."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, which types a text, and let it go."""
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                **({"text": text} if kind == "keyDown" else {}),
            )  # fmt: skip

    def resize(self, width: int) -> None:
        """Make the window so wide, and 900 pixels high."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for since ``open``, the page's own and ``data:`` left out."""
        urls = [
            each["params"]["request"]["url"] for each in self._events
            if each["method"] == "Network.requestWillBeSent"
        ]  # fmt: skip
        return [url for url in urls if url.split("#")[0] != self._own and url[:5] != "data:"]

    @property
    def messages(self) -> list[str]:
        """What the page wrote to the console since ``open``, errors and refusals included."""
        return [
            json.dumps(each["params"]) for each in self._events
            if each["method"] in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown",
                                  "Log.entryAdded"}
        ]  # fmt: skip
