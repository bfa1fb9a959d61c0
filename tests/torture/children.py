"""The command line in children forked from one warm process: an import costs 3 s, a fork 10 ms.

A child is the real command: ``featcache.cli.main.main`` with its own exit, through the
interpreter's end.
Before it starts, a test may have it prepared (``before=``, see ``_PREPARATIONS``): a limit, another
user, small shards, a kill at its n-th file-system call, notes of how far it got.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TESTS = Path(__file__).parents[1]
TINY = ("--backbone", "python:tiny_network:build", "--engine", "folded")
SECONDS = 120
"""More than any child takes on the slowest machine: then it hangs."""

Preparation = tuple[Any, ...]
"""Name of a function in ``_PREPARATIONS`` and its arguments."""


class Result(NamedTuple):
    """What a command left: its exit code, negative for a signal, and what it said."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        facts: dict[str, Any] = json.loads(self.out)
        return facts

    def error(self) -> str:
        """Return the one line of a command that failed as it should: exit 1, no traceback."""
        assert self.code == 1, self
        assert "Traceback" not in self.err, self
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0]


@dataclass
class Child:
    """A command under way."""

    pid: int
    _out: Path
    _parent: Parent

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal. The process number is its own until it was waited for."""
        os.kill(self.pid, number)

    def wait(self) -> Result:
        """Wait until it ends."""
        code = self._parent.wait(self.pid)
        out, err = (Path(f"{self._out}.{name}").read_text("utf-8") for name in ("out", "err"))
        return Result(code, out, err)

    @property
    def said(self) -> str:
        """What it has said so far, on both streams."""
        return "".join(Path(f"{self._out}.{name}").read_text("utf-8") for name in ("out", "err"))

    def is_running(self) -> bool:
        """Whether it has not ended yet (it then still has to be waited for)."""
        return self._state() != "Z"

    def is_stopped(self) -> bool:
        """Whether it waits for SIGCONT."""
        return self._state() == "T"

    def _state(self) -> str:
        status = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace")
        return status.rpartition(")")[2].split()[0]


class Parent:
    """The warm process, seen from the tests."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._number = 0
        self._children: set[int] = set()
        # One thread: a process that is forked must not have others, and arrays must be equal.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        }  # fmt: skip
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, env=environment
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request to the process and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments: object, cwd: Path, before: tuple[Preparation, ...] = ()) -> Child:
        """Start ``featcache ARGUMENTS`` in a folder, prepared as ``before`` says."""
        self._number += 1
        out = Path(self._folder.name) / str(self._number)
        for name in ("out", "err"):  # it may be killed before it could make them
            Path(f"{out}.{name}").touch()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "out": str(out),
            "before": [[str(x) if isinstance(x, Path) else x for x in step] for step in before],
        }
        pid = self.ask(request)
        self._children.add(pid)
        return Child(pid, out, self)

    def wait(self, pid: int) -> int:
        """Wait until a child ends; return its exit code."""
        self._children.discard(pid)
        code: int = self.ask({"wait": pid})
        return code

    def run(self, *arguments: object, cwd: Path, before: tuple[Preparation, ...] = ()) -> Result:
        """Run ``featcache ARGUMENTS`` to its end."""
        return self.start(*arguments, cwd=cwd, before=before).wait()

    def stop(self) -> None:
        """End the process, and children that a failed test has left."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        self._process.communicate()
        self._folder.cleanup()


@functools.cache
def warm_parent() -> Parent:
    """Return the one process of this test session."""
    parent = Parent()
    atexit.register(parent.stop)
    return parent


# --- what tests ask of a folder


def names(folder: Path) -> set[str]:
    """Return the names in a folder, also the hidden ones."""
    return {path.name for path in folder.iterdir()}


def noted_rows(notes: Path, word: str) -> int:
    """Return how many rows were noted as ``run``, as ``taken``, or in an acknowledged ``shard``."""
    if not notes.exists():
        return 0
    lines = map(str.split, notes.read_text("ascii").splitlines())
    return sum(int(number) for kind, number in lines if kind == word)


def all_arrays(path: Path) -> dict[str, str]:
    """Return the sha256 of every array of a cache but its provenance, the whole file checked."""
    from featcache.cache.reading import open_cache

    container = open_cache(path).container
    return {
        name: hashlib.sha256(container.map(name).tobytes()).hexdigest()
        for name in container.arrays
        if name != "provenance"
    }


def wait_for(condition: Callable[[], object], child: Child | None) -> bool:
    """Wait until ``condition`` holds; return whether it does before the child ends."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it hangs"
        if child is not None and not child.is_running():
            return bool(condition())
        time.sleep(0.0003)
    return True


# --- in the child


def _small_shards(rows: int, batch_size: int) -> None:
    """Let a shard hold so many rows of the tiny backbone, which is run in such batches."""
    import tiny_network

    from featcache.extraction import work

    work.SHARD_BYTES = tiny_network.shard_bytes(rows, batch_size)


def _slow(seconds: float) -> None:
    """Wait so long before each batch is taken."""
    from featcache.extraction import work

    inner = work.stream_features

    def slow(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in inner(*arguments, **options):
            time.sleep(seconds)
            yield batch

    work.stream_features = slow


def _gate(file: str) -> None:
    """Take no batch before a file is there; make another when it is waited for."""
    from featcache.extraction import work

    inner = work.stream_features

    def gated(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in inner(*arguments, **options):
            Path(f"{file}.reached").touch()
            while not Path(file).exists():
                time.sleep(0.001)
            yield batch

    work.stream_features = gated


def _note(file: str) -> None:
    """Append a line for every batch that is run or was taken, and every acknowledged shard."""
    from featcache.extraction import pipeline, work
    from featcache.extraction.partial_cache import PartialCache

    notes = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    stream, add_shard = work.stream_features, PartialCache.add_shard
    forward_chunk = pipeline._forward_chunk

    def noting_forward(run: Any, outcomes: Any, views: Any, clock: Any) -> Any:
        number = sum(of_image is not None for of_image in views)
        os.write(notes, f"run {number}\n".encode())
        return forward_chunk(run, outcomes, views, clock)

    def noting_stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in stream(*arguments, **options):
            yield batch
            os.write(notes, f"taken {len(batch.outcomes)}\n".encode())

    def noting_shard(self: Any, receipt: Any) -> Any:
        added = add_shard(self, receipt)
        os.write(notes, f"shard {receipt.num_rows}\n".encode())
        return added

    pipeline._forward_chunk = noting_forward
    work.stream_features = noting_stream
    PartialCache.add_shard = noting_shard  # type: ignore[assignment]


_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock"}


def _at_call(path: str, number: int, action: str) -> None:
    """Die, or freeze, before the n-th call that changes a name, writes a file or syncs a folder.

    Counted are calls about names in the folder of ``path`` that have its name in theirs. With
    ``number`` 0 nothing happens but that their count is written to the file ``action`` at the end.
    """
    folder, name = os.path.split(path)
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _CHANGES or not _is_about(arguments[0], folder, name):
            return
        is_read = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_read and (isinstance(arguments[0], int) or not _is_folder(arguments[0])):
            return  # a folder is opened to sync it
        count += 1
        if count == number:
            os.kill(os.getpid(), getattr(signal, action))

    sys.addaudithook(hook)
    if not number:
        _AT_END.append(lambda: Path(action).write_text(str(count), "ascii"))


def _is_folder(argument: Any) -> bool:
    return Path(os.fsdecode(argument)).is_dir()


def _is_about(argument: Any, folder: str, name: str) -> bool:
    if isinstance(argument, int):
        with contextlib.suppress(OSError):
            argument = Path(f"/proc/self/fd/{argument}").readlink()
    with contextlib.suppress(TypeError):
        text = os.fsdecode(argument)
        # rmtree names what it removes relative to an open folder
        place = os.path.abspath(text)  # noqa: PTH100 (a name may be a link, and stays one)
        return (place.startswith(folder) and name in text) or "/" not in text
    return False


def _limit(name: str, number: int) -> None:
    import resource

    resource.setrlimit(getattr(resource, name), (number, number))


def _memory(more_bytes: int) -> None:
    """Allow only so much more address space than there is in use."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    _limit("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + more_bytes)


def _become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def _environment(name: str, value: str) -> None:
    os.environ[name] = value


def _set(module: str, name: str, value: Any) -> None:
    """Change a constant."""
    import importlib

    setattr(importlib.import_module(module), name, value)


def _call(module: str, name: str, *arguments: Any) -> None:
    """Let a function of a module of the tests prepare the rest."""
    import importlib

    getattr(importlib.import_module(module), name)(*arguments)


def _no_locks(code: int) -> None:
    """Let every flock fail, as on a network file system that has none."""
    import fcntl

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    fcntl.flock = fail  # type: ignore[assignment]


def _stop_before_lock() -> None:
    """Stop when the lock file is open and not locked yet."""
    import fcntl

    inner = fcntl.flock

    def stopping(*arguments: Any) -> None:
        fcntl.flock = inner
        os.kill(os.getpid(), signal.SIGSTOP)
        inner(*arguments)

    fcntl.flock = stopping  # type: ignore[assignment]


def _after(wanted: str, command: list[str], module: str) -> None:
    """Run another command to its end at the moment ``module`` is about to call ``wanted``."""
    import importlib

    place = importlib.import_module(module)
    inner = getattr(place, wanted)

    def first_the_other(*arguments: Any, **options: Any) -> Any:
        setattr(place, wanted, inner)
        if (child := os.fork()) == 0:
            _command(command)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return inner(*arguments, **options)

    setattr(place, wanted, first_the_other)


def _at_moment(number: int, action: str) -> None:
    """Get a signal at the n-th call of a function of featcache in the main thread.

    Calls are counted from where the command line calls the command. With ``number`` 0 nothing
    happens but that their count is written to the file ``action`` at the end.
    """
    package = str(TESTS.parent / "featcache")
    count, has_begun = 0, False

    def profile(frame: Any, event: str, _: object) -> None:
        nonlocal count, has_begun
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        has_begun = has_begun or code.co_name == "_call"
        count += has_begun
        if count == number and has_begun:
            os.kill(os.getpid(), getattr(signal, action))

    sys.setprofile(profile)
    if not number:
        _AT_END.append(lambda: Path(action).write_text(str(count), "ascii"))


def _stuck(module: str, name: str, file: str) -> None:
    """Let a function hang where no signal reaches it; make a file when it does.

    The watchdog waits for a tenth of a second only, where a shard is in hand too.
    """
    import importlib
    import threading

    from featcache.cli import ending
    from featcache.extraction import work
    from featcache.runtime import INTERRUPTS

    ending._ENDING_SECONDS = ending._HELD_SECONDS = work._MOST_PATIENCE = 0.1

    def hang(*_: Any, **__: Any) -> None:
        with contextlib.suppress(ValueError):  # in a thread: the main one waits for it
            for number in INTERRUPTS:
                signal.signal(number, lambda *_: None)
        Path(file).touch()
        threading.Event().wait()

    place, _, function = name.rpartition(".")
    found = importlib.import_module(module)
    setattr(getattr(found, place) if place else found, function, hang)


def _ignore(name: str) -> None:
    signal.signal(getattr(signal, name), signal.SIG_IGN)


def _save_each_epoch() -> None:
    from featcache.heads import resuming

    resuming.SAVE_SECONDS = 0.0


_AT_END: list[Callable[[], object]] = []
_ends_for_real = False


def _end_for_real() -> None:
    """End through the interpreter's end, where libraries may crash: it takes 0.5 s in a fork."""
    global _ends_for_real  # noqa: PLW0603
    _ends_for_real = True


_PREPARATIONS: dict[str, Callable[..., None]] = {
    "small_shards": _small_shards, "slow": _slow, "gate": _gate, "note": _note, "at_call": _at_call,
    "limit": _limit, "memory": _memory, "become": _become, "environment": _environment,
    "set": _set, "call": _call,
    "no_locks": _no_locks, "stop_before_lock": _stop_before_lock,
    "at_moment": _at_moment, "stuck": _stuck, "ignore": _ignore,
    "save_each_epoch": _save_each_epoch,
    "after": _after, "end_for_real": _end_for_real,
}  # fmt: skip


def _command(arguments: list[str]) -> NoReturn:
    from featcache.cli.main import main

    code: Any = 1
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    for function in _AT_END:
        function()
    if _ends_for_real:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- the warm process


def _serve() -> None:
    import importlib

    import tiny_network  # noqa: F401
    import torch
    from PIL import Image

    import featcache

    for name in ("cli.main", *featcache._MODULES.values(), "cli.wording", "pixels.isolation"):
        importlib.import_module(f"featcache.{name}")
    # What is imported late, also of the standard library: a child that has become nobody may not.
    for name in (
        "sklearn.metrics",
        "safetensors.torch",
        "matplotlib.figure",
        "h5py",
        "optuna",
        "resource",
        "encodings.ascii",
    ):
        importlib.import_module(name)
    Image.init()
    torch.set_num_threads(1)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        if "wait" in request:
            code = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            answers.write(f"{code}\n")
            continue
        if (child := os.fork()) == 0:
            _become_child(request)
            _command(request["arguments"])  # ends by sys.exit, as the real one
        answers.write(f"{child}\n")


def _become_child(request: dict[str, Any]) -> None:
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{request['out']}.{name}", os.O_WRONLY), handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, *arguments in request["before"]:
        _PREPARATIONS[name](*arguments)


if __name__ == "__main__":
    _serve()
