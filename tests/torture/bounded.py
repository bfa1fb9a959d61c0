"""Run a function in a process of its own, with limits on its memory and time.

Children are forked from one server that has imported everything and started no thread: a child
costs some 30 ms in place of the 4 s of importing torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from fork_server import CONTEXT

from featcache.errors import FeatcacheError

if sys.platform == "win32":
    pytest.skip("needs POSIX files, links, limits and signals", allow_module_level=True)

import resource

GIB = 2**30


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        value: What the function returned.
        error: The error of featcache that it raised instead.
        warnings: Texts of the warnings.
        peak_bytes: The most memory that was resident.
    """

    value: Any
    error: FeatcacheError | None
    warnings: tuple[str, ...]
    peak_bytes: int


def run_bounded(
    function: Callable[..., Any], *arguments: Any, seconds: float = 300, gib: float = 3
) -> Ended:
    """Call ``function`` (of a module, so that it pickles) in a child, and say how it ended.

    Args:
        function: What to call.
        arguments: With what.
        seconds: It is killed, and the test fails, when it takes longer: it hangs.
        gib: Address space it may take beyond what its imports take. Threads reserve far more
            address space than memory; see ``Ended.peak_bytes`` for that.

    Raises:
        AssertionError: If the child hung, died, or raised what is no error of featcache.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_call, args=(sender, function, arguments, gib))
    child.start()
    sender.close()
    try:
        assert receiver.poll(seconds), f"{function.__name__} hung for {seconds} s"
        ended, trouble = receiver.recv()
    except EOFError:
        child.join(seconds)
        raise AssertionError(f"{function.__name__} died: exit code {child.exitcode}") from None
    finally:
        if receiver.poll(0) or child.is_alive():
            child.join(5)
        child.kill()
        child.join()
        receiver.close()
    assert not trouble, trouble
    assert isinstance(ended, Ended)
    return ended


def _call(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], gib: float
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere the limit is not kept, or the size not to be had
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGESIZE") + int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    value, error, trouble = None, None, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = function(*arguments)
        except FeatcacheError as raised:
            error = raised
        except BaseException:  # noqa: BLE001  (also SystemExit: told to the parent)
            trouble = traceback.format_exc()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    sender.send((Ended(value, error, tuple(str(w.message) for w in caught), peak), trouble))


@dataclass(frozen=True)
class Printed:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def command(folder: Path, *arguments: object, **limits: float) -> Printed:
    """Run a ``featcache`` command in ``folder``, in a child; standard output is no terminal."""
    texts = [os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in arguments]
    ended = run_bounded(run_here, folder, texts, **limits)
    assert ended.peak_bytes < GIB, f"{ended.peak_bytes:,} bytes"
    printed = ended.value
    assert isinstance(printed, Printed)
    return printed


def run_here(folder: Path, arguments: list[str]) -> Printed:
    """Do what the command line does, in this process (a child, by its streams and folder)."""
    from featcache.cli.main import main

    os.chdir(folder)
    streams = []
    for name in ("stdout", "stderr"):
        streams.append(io.TextIOWrapper(io.BytesIO(), "utf-8"))
        setattr(sys, name, streams[-1])
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert isinstance(code, int)
    out, err = (_taken(stream) for stream in streams)
    return Printed(code, out, err)


def _taken(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode()
