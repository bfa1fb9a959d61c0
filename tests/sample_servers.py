"""A server of a tiny run in a process of its own, and clients that are polite or not."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny_network
from command_line import TESTS
from sample_images import write_tree

import featcache

BOUNDARY = "gTz8-boundary"
KIND = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}

# Without the garbage collector, so that a test sees what a request leaves in a cycle.
_START = """
import gc, json, sys
import featcache
gc.disable()
from featcache.deployment.server.uploads import Limits
def ready(facts):
    print(json.dumps(facts), flush=True)
featcache.serve(sys.argv[1], port=0, backbone="python:tiny_network:build", device="cpu",
    max_pixels=int(sys.argv[2]), limits=Limits(**json.loads(sys.argv[3])), ready=ready)
"""
# In the server and in its children: whatever is opened for writing is told on standard error.
_AUDIT = """
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def hook(event, arguments):
    if event == "open" and (
        isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        or isinstance(arguments[2], int) and arguments[2] & WRITES
    ) or event.split(".")[0] in {"tempfile", "shutil"} or event in {"os.mkdir", "os.rename"}:
        os.write(2, f"WRITES {event} {arguments}\\n".encode())
sys.addaudithook(hook)
"""


class Answer(NamedTuple):
    status: int
    facts: dict[str, Any]
    headers: dict[str, str]


class Server:
    """A server in a process of its own.

    Args:
        folder: Where ``run`` lies; what the server says goes into it too.
        limits: Those that are not the usual ones.
        max_pixels: As for ``serve``.
    """

    def __init__(self, folder: Path, *, max_pixels: int = 1 << 24, **limits: float) -> None:
        site = folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_AUDIT)
        self._log = folder / "server.log"
        path = os.pathsep.join([str(site), str(TESTS)])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(folder / "run"), str(max_pixels),
                 json.dumps(limits)],
                stdout=subprocess.PIPE, stderr=log, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.ready: dict[str, Any] = json.loads(line)
        self.url: str = self.ready["url"]
        self.port = int(self.url.rsplit(":", 1)[1].strip("/"))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def said(self) -> str:
        """Return what it wrote on standard error."""
        return self._log.read_text("utf-8")

    def memory(self) -> int:
        """Return its resident bytes, without those of its children."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            text = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            facts = json.loads(text) if is_json and text else {"text": text.decode()}
            return Answer(response.status, facts, dict(response.headers))
        finally:
            connection.close()

    def send(self, *files: tuple[str, bytes], path: str = "/predict", **headers: str) -> Answer:
        """Send files as a form does."""
        return self.ask("POST", path, form(*files), **(KIND | headers))

    def begin(self, head: str) -> socket.socket:
        """Connect and send something raw, which need not be whole."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        made.sendall(head.replace("\n", "\r\n").encode())
        return made


def form(*files: tuple[str, bytes]) -> bytes:
    """Return files as the body of a form."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        .encode() + data + b"\r\n"
        for name, data in files
    ]  # fmt: skip
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def read_raw(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Return status and JSON of the answer on a raw connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def make_run(folder: Path) -> Path:
    """Write images, a cache and a run with a threshold."""
    write_tree(folder / "data")
    featcache.extract(folder / "data", folder / "c.h5", backbone=tiny_network.build())
    featcache.train(folder / "c.h5", folder / "run", hidden=(4,), epochs=3, device="cpu")
    return folder


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """Return a PNG of 8-bit grey whose header may promise more than there is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    rows = b"".join(b"\0" + pixels[i : i + width] for i in range(0, len(pixels), width))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 0, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")
    )  # fmt: skip


def large_png(seed: int = 0) -> bytes:
    """Return a PNG of 5 MB."""
    side = 2240
    return png(
        side, side, np.random.default_rng(seed).integers(0, 256, side * side, "u1").tobytes()
    )
