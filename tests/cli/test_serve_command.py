"""``featcache serve`` from its start to its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TESTS, TINY, assert_one_line_error
from sample_servers import KIND, form, make_run, read_raw

from featcache.cli import main as cli
from featcache.deployment.server.serving import MAX_PIXELS


def test_the_default_of_max_pixels_is_that_of_the_library() -> None:
    (option,) = (p for p in cli.cli.commands["serve"].params if p.name == "max_pixels")
    assert option.default == MAX_PIXELS


def test_a_port_in_use_is_one_line(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = run("serve", "run", "--port", other.getsockname()[1])
    assert_one_line_error(result, "--port", "in use")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_signal_lets_the_requests_in_hand_finish(tmp_path: Path) -> None:
    make_run(tmp_path)
    command = [sys.executable, "-m", "featcache", "serve", "run", "--port", "0", *TINY, "--json"]
    server = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert server.stdout is not None
    port = int(json.loads(server.stdout.readline())["url"].rsplit(":", 1)[1].strip("/"))
    body = form(("a.png", next(tmp_path.glob("data/test/covid/*.png")).read_bytes()))
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: {KIND['Content-Type']}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            for _ in range(2)
        ]
        for connection in held:
            connection.sendall(head.encode() + body[:-10])
        others = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

        def health() -> dict[str, Any]:
            others.request("GET", "/health")
            return json.loads(others.getresponse().read())

        while health()["num_requests"] < 2:
            pass  # the server has not read them yet
        others.close()
        server.send_signal(signal.SIGTERM)
        held[0].sendall(body[-10:])
        status, facts = read_raw(held[0])
        assert (status, facts["predictions"][0]["path"]) == (200, "a.png")
        status, facts = read_raw(held[1])  # this one never comes to an end
        assert (status, facts["error"]["what"]) == (503, "server")
        output, errors = server.communicate()
    assert server.returncode == 128 + signal.SIGTERM, errors
    assert output == ""
    wanted = "interrupted: the requests in hand were answered; the same command starts again\n"
    assert errors.strip() == wanted.strip()
