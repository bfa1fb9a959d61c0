"""Fixtures of the command line's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Result

from featcache.cli import main as cli


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """Call the command line in this process, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        with warnings.catch_warnings():
            code = cli._run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    yield call
    warnings.showwarning = show
