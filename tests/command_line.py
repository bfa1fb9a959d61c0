"""The command line in this process and in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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
