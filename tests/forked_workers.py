"""Workers that are forks of the command, so that hundreds can be killed: an import of torch is 3 s.

They are processes of their own, as ``local`` starts them, but for the import of modules. The
command is a child of ``children.warm_parent``, which has one thread as long as no worker is there.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn


class _Fork(subprocess.Popen[bytes]):
    """A fork of this process that runs ``local.main``."""

    def _execute_child(self, *arguments: Any) -> None:
        names = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
        given = names.bind(self, *arguments).arguments
        self.pid = os.fork()
        if self.pid == 0:
            _work(given["p2cread"], given["c2pwrite"])
        self._child_created = True
        for name in ("p2cread", "c2pwrite"):
            os.close(given[name])


def _work(orders: int, answers: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(orders, 0)
        os.dup2(answers, 1)
        os.closerange(3, 1024)  # else the pipes of other workers stay open
        sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        from featcache.extraction.workers import local

        local.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def prepare(forwards: str, seconds: float) -> None:
    """Let the workers of this process be forks, and note each image that is run.

    Args:
        forwards: A file that gets a line with the path of every image that goes through the
            network, in workers and in this process; beside it a file ``.pauses``.
        seconds: To wait before each batch is taken.
    """
    from featcache.extraction import pipeline, work
    from featcache.extraction.workers import local, worker

    subprocess_names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    local.subprocess = SimpleNamespace(Popen=_Fork, **subprocess_names)  # type: ignore[assignment]
    forward_chunk = pipeline._forward_chunk

    def noting(lanes: Any, outcomes: Any, views: Any, clock: Any) -> Any:
        pairs = zip(outcomes, views, strict=True)
        paths = [outcome.sample.path for outcome, of_image in pairs if of_image is not None]
        with Path(forwards).open("ab", buffering=0) as file:
            file.write("".join(f"{path}\n" for path in paths).encode())
        return forward_chunk(lanes, outcomes, views, clock)

    pipeline._forward_chunk = noting
    for module in (worker, work):
        slow = _slowly(module.stream_parts, seconds, f"{forwards}.pauses")
        module.stream_parts = slow  # type: ignore[assignment]


def _slowly(inner: Any, seconds: float, pauses: str) -> Any:
    """Wait before each batch, and write a byte into a file before that."""

    def slow(*arguments: Any, **options: Any) -> Iterator[Any]:
        with contextlib.closing(inner(*arguments, **options)) as batches:
            for batch in batches:
                with Path(pauses).open("ab", buffering=0) as file:
                    file.write(b".")
                time.sleep(seconds)
                yield batch

    return slow
