"""Child processes that run in this process, where half a second for each is not the promise.

The children themselves are tested in test_isolation.py, test_killing_decoders.py,
test_hdf5_comparison.py, test_hostile_caches.py and, for masks, test_companions.py.
"""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from featcache.extraction import recipe, view_stream
from featcache.pixels import inspection, views

_MODULES = {"featcache.pixels.isolation", "featcache.cache.hdf5"}


class DecoderHere:
    """Stands for ``IsolatedDecoder``, whose methods do what these functions do."""

    render = staticmethod(views.render)
    deep_maximum = staticmethod(inspection.deep_maximum)
    deep_kind = staticmethod(inspection.deep_kind)

    def __enter__(self) -> DecoderHere:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def decode_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let extractions decode deep and suspicious images in this process."""
    for module in (recipe, view_stream):
        monkeypatch.setattr(module, "IsolatedDecoder", DecoderHere)


def run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process the child that looks for masks, and that in which libhdf5 reads a cache.

    Not for hostile files: there are no limits, and libhdf5 may crash.
    """
    run = subprocess.run

    def run_module(command: Any, **options: Any) -> Any:
        # As child_process makes it: python -P -m MODULE ARGUMENTS
        if command[1:3] != ["-P", "-m"] or command[3] not in _MODULES:
            return run(command, **options)
        answers, code, reason = io.BytesIO(), 0, b""
        stdin = SimpleNamespace(buffer=io.BytesIO(options.get("input", b"")))
        with (
            mock.patch("resource.setrlimit"), mock.patch.dict(os.environ, options["env"]),
            mock.patch.object(sys, "argv", command[3:]), mock.patch.object(sys, "stdin", stdin),
            mock.patch.object(sys, "stdout", io.TextIOWrapper(answers)) as stdout,
        ):  # fmt: skip
            try:
                runpy.run_path(sys.modules[command[3]].__file__ or "", run_name="__main__")
                stdout.flush()
            except Exception as error:  # noqa: BLE001 (a child ends with its traceback)
                code, reason = 1, f"{type(error).__name__}: {error}".encode()
            stdout.detach()
        return subprocess.CompletedProcess(command, code, answers.getvalue(), reason)

    monkeypatch.setattr(subprocess, "run", run_module)
