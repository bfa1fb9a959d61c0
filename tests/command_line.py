"""The command line in this process and in one of its own."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl
    import pty
    import termios

TESTS = Path(__file__).parent

TINY = ["--backbone", "python:tiny_network:build"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, "-m", "featcache", *map(str, arguments)], cwd=cwd, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def on_terminal(arguments: Sequence[object], cwd: Path, columns: int) -> str:
    """Run Python on a terminal of so many columns; return what is shown, line ends as they come."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    shown = b""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, stdin=theirs,
        stdout=theirs, stderr=theirs,
    ) as child:  # fmt: skip
        os.close(theirs)
        with contextlib.suppress(OSError):  # the terminal is closed with the child
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert child.returncode == 0, shown
    return shown.decode()


def assert_one_line_error(result: Result | subprocess.CompletedProcess[str], *parts: str) -> None:
    code = result.code if isinstance(result, Result) else result.returncode
    text = result.err if isinstance(result, Result) else result.stderr
    assert code == 1, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    assert re.search(r"error: .+: expected .+, found .+\.", errors[0]), errors[0]
    for part in parts:
        assert part in errors[0], (part, errors[0])
