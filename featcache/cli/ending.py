"""How a command ends: by a signal, with closed or full streams, or with an error for a script.

A signal raises ``Interrupted`` in the main thread. Where that thread is in code that cannot be
interrupted (a compilation, one long batch, the exit of a library), a watchdog thread says the same
sentence and ends the process: a kill loses nothing, as ``tests/torture`` shows.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import click

from featcache.data.remote import url_of
from featcache.errors import FeatcacheError, printable
from featcache.files import follow_link
from featcache.renames import beside

_ENDING_SECONDS = 1.5  # after a signal; with the time it takes to be scheduled, 2 s
_BEGIN_SECONDS = 2.0  # for the watchdog; it takes 0.1 ms
_HELD_SECONDS = 9.0  # at least, where extract finishes the batch in hand and writes its shard
_NOTICE_SECONDS = 2.0  # then it is said what the command waits for

_OUTPUTS = {
    "split": "destination", "extract": "cache", "select": "new", "verify": "cache", "train": "run",
    "sweep": "run", "crossval": "folder", "audit": "csv", "predict": "csv", "export": "file",
    "explain": "out",
    "report": "file",
    "convert": "output",
}  # fmt: skip
"""The option or argument that names what a command makes.

evaluate makes several files, decide one in a run."""

TRAINING_NAME = "training.safetensors"


class Command:
    """The command under way, and what its output looked like before it began.

    Args:
        verb: ``train``, say.
        options: Its arguments and options by their names in Python.
    """

    def __init__(self, verb: str = "", options: Mapping[str, Any] | None = None) -> None:
        self._verb, self._options = verb, dict(options or {})
        name = self._options.get(_OUTPUTS.get(verb, ""))
        self._output = None if name is None else Path(name)
        self._url = None if name is None else url_of(name)
        if self._url is not None:
            from featcache.cache.remote_copies import place_of

            self._url = self._url.rstrip("/")
            self._output = place_of(self._url, "work")
        self._before = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        if self._output is None:
            return None
        with contextlib.suppress(OSError):
            status = self._output.stat()
            return status.st_ino, status.st_mtime_ns
        return None

    def what_is_kept(self) -> str:
        """Return a sentence that is true at this moment, for a command that was interrupted."""
        again, output = "the same command starts again", self._output
        if not self._verb:
            return f"nothing was begun; {again}"
        if self._url is not None:
            from featcache.cache.remote_work import Work

            work = Work(self._url)
            if work.is_made():
                return (
                    f"{printable(self._url)} is whole in {printable(work.folder)}, and not sent: "
                    "the next command for it sends it, without --overwrite and --rebuild"
                )
        elif output is not None and self._stamp() not in {None, self._before} and self._is_whole():
            return f"{_name(output)} is whole, nothing else is left to do"
        if self._verb == "demo":
            folder = _name(self._options["folder"])
            return f"{folder} is unfinished; the same command makes it anew"
        if self._verb == "decide":
            return "the decision in the run is the old one or the new one, whole; " + again
        if self._verb == "log":
            return "what was logged is in the tracker; the same command goes on"
        if self._verb == "evaluate":
            return "some figures may be written and others not; the same command writes them all"
        if self._verb in {"info", "neighbours", "serve"} or self._options.get("dry_run"):
            return f"nothing was changed; {again}"
        if self._verb == "verify":
            assert output is not None
            return f"{_name(output)} is as it was; {again}"
        kept = "" if output is None else self._kept_in_part(output)
        return f"{kept}; the same command goes on" if kept else f"nothing is kept; {again}"

    def _is_whole(self) -> bool:
        """Whether an output that has changed is finished: a folder of caches need not be."""
        return self._verb != "extract" or self._output is None or not self._output.is_dir()

    def _kept_in_part(self, output: Path) -> str:
        """Return what an unfinished extract, train, sweep or crossval has kept, or nothing."""
        partial, journal = (_beside(output, ending) for ending in (".partial", ".sweep"))
        if self._verb == "extract":
            if output.is_dir():
                return f"the caches and images that are done are kept in {_name(output)}"
            if (partial / "manifest.json").exists():
                return f"the images that are done are kept in {_name(partial)}"
        if self._verb == "train" and (partial / TRAINING_NAME).exists():
            return f"the training up to its last save, once a minute, is kept in {_name(partial)}"
        if self._verb == "sweep" and _has_entries(journal / "journal.jsonl"):
            return f"the trials of the rounds that are done are kept in {_name(journal)}"
        if self._verb == "crossval" and _has_entries(partial / "journal.jsonl"):
            return f"the folds that are done are kept in {_name(partial)}"
        return ""


def _beside(output: Path, ending: str) -> Path:
    with contextlib.suppress(FeatcacheError):  # links in a circle: refused by the verb
        return beside(follow_link(output.absolute()), ending)
    return output.absolute()


def _name(path: Path) -> str:
    with contextlib.suppress(ValueError, OSError):
        path = path.relative_to(Path.cwd())
    return printable(path.as_posix())


def _has_entries(journal: Path) -> bool:
    """Whether a journal has more than its first line, which says what the work is."""
    with contextlib.suppress(OSError), journal.open("rb") as file:
        return len(file.readline()) > 0 and file.readline().endswith(b"\n")
    return False


class Ending:
    """What ends the process, from signals to full streams; there is one, ``ENDING``.

    Attributes:
        command: The command under way.
        as_json: Whether an error is also printed as a JSON object on standard output.
        lost_output: Why lines could not be printed on standard output, None if they could.
    """

    def __init__(self) -> None:
        self._facts: TextIO | None = None
        self.reset()

    def reset(self, *, as_json: bool = False) -> None:
        """Begin anew, with no command yet."""
        self.command, self.as_json = Command(), as_json
        self.lost_output: OSError | None = None
        self._signal, self._is_over = 0, False
        self._lock = threading.Lock()

    def listen(self) -> None:
        """Let signals end the process. Those that are ignored stay so, as under ``nohup``."""
        from featcache.runtime import INTERRUPTS

        for number in INTERRUPTS:
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:
                signal.signal(number, self._interrupt)
        hears, tells = socket.socketpair()
        tells.setblocking(False)
        # The number is sent the moment a signal comes, also while the main thread is in C code.
        signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
        if hasattr(os, "register_at_fork"):  # a child's signals are not ours
            os.register_at_fork(after_in_child=_hear_nothing)
        # Not threading.Thread: its start() waits for ever if the thread finds no memory. Then the
        # hook must not need any: this one is in C, and says nothing.
        sys.unraisablehook = deque[object](maxlen=0).append
        begun = threading.Semaphore(0)
        try:
            _thread.start_new_thread(self._watch, (hears, tells, INTERRUPTS, begun))
            is_watched = begun.acquire(timeout=_BEGIN_SECONDS)
        except (RuntimeError, MemoryError):
            is_watched = False
        if not is_watched:
            signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._show_unraisable

    def _interrupt(self, number: int, frame: object) -> None:
        from featcache.runtime import Interrupted

        is_first, self._signal = not self._signal, self._signal or number
        if is_first and not self._is_over:  # further ones must not cut the tidying up short
            raise Interrupted(number)

    def _show_unraisable(self, unraisable: Any) -> None:
        """Say nothing of what an interruption broke in a finalizer."""
        if not self._signal:
            sys.__unraisablehook__(unraisable)

    def _watch(
        self, hears: socket.socket, tells: socket.socket, numbers: tuple[int, ...],
        begun: threading.Semaphore,
    ) -> None:  # fmt: skip
        """End the process some time after a signal, if nothing else does."""
        from featcache.runtime import held_seconds

        begun.release()
        first, deadline, notice = 0, float("inf"), float("inf")
        with tells:  # it must stay open
            while True:
                left = min(deadline, notice) - time.monotonic()
                hears.settimeout(None if first == 0 else max(left, 1e-3))
                try:
                    came = [number for number in hears.recv(64) if number in numbers]
                except TimeoutError:
                    if notice > deadline:
                        self._end(first)
                    else:
                        self._say_held(deadline - time.monotonic())
                    notice = float("inf")
                    continue
                for number in came:
                    # Not ours: ``held_signals`` has its own handler while a shard is in hand.
                    is_held = signal.getsignal(number) != self._interrupt and not self._signal
                    first = first or number
                    needed = held_seconds() if is_held else 0.0  # 0: it has not told
                    wait = max(_HELD_SECONDS, needed) if is_held else _ENDING_SECONDS
                    deadline = min(deadline, time.monotonic() + wait)
                    is_long = needed > _NOTICE_SECONDS
                    notice = time.monotonic() + _NOTICE_SECONDS if is_long else float("inf")

    def _say_held(self, seconds: float) -> None:
        """Say that the signal was heard, and what to do for whom it takes too long."""
        with self._lock:
            if not self._is_over:
                complain(
                    f"finishing the batch in hand, {seconds:.0f} s at most, so that nothing is "
                    "done twice; the same signal again ends at once"
                )

    def _end(self, number: int) -> None:
        # In a thread of its own, as whoever reads our streams may have stopped reading.
        says = threading.Thread(target=self.say_interrupted, args=[number], daemon=True)
        says.start()
        says.join(0.3)
        os._exit(128 + number)

    def say_interrupted(self, number: int, sentence: str = "") -> None:
        """Say once that the command was interrupted, and what is kept.

        Args:
            number: Of the signal.
            sentence: What is said; by default what is true of the command.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            said = sentence or f"interrupted: {self.command.what_is_kept()}"
            complain(said)
            name = signal.Signals(number).name
            self.print_error("interrupted", "a command that ends by itself", name, None, said)

    def finish(self) -> None:
        """Let signals change nothing any more: the command has ended, and said so."""
        with self._lock:
            self._is_over = True

    def say_error(self, error: FeatcacheError) -> None:
        """Print an error as one line on standard error, and for ``--json`` as an object."""
        complain(f"error: {error}")
        self.print_error(error.what, error.expected, error.found, error.where, error.hint)
        self.finish()

    def print_error(self, *values: object) -> None:
        """For ``--json`` print an object: what, expected, found, where, and what to do next."""
        if not self.as_json:
            return
        keys = ("what", "expected", "found", "where", "hint")
        facts = {
            key: None if value is None else printable(value)
            for key, value in zip(keys, values, strict=True)
        }
        self.print(json.dumps({"error": facts}))

    def reserve_output(self) -> None:
        """Keep standard output for what ``print`` prints: for ``--json``, one object.

        What libraries print there, in Python or in C, goes to standard error.
        """
        sys.stdout.flush()
        self._facts = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)
        # Anew: the old one would seek in what it was opened for.
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115

    def print_line(self, text: str) -> None:
        """Print a line for people, broken between words where the terminal is narrower."""
        self.print(to_width(text, sys.stdout))

    def print(self, text: str) -> None:
        """Print a text on standard output. If it has no room, drop this line and all others.

        The work goes on: what the command makes is worth more than its lines.

        Raises:
            BrokenPipeError: If nobody reads any more.
        """
        stream = self._facts or sys.stdout
        try:
            click.echo(text, file=stream)
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost_output = self.lost_output or error
            _discard(stream)


def complain(text: str) -> None:
    """Print a line on standard error, unless that is full or gone."""
    with contextlib.suppress(OSError, ValueError):
        click.echo(to_width(text, sys.stderr), err=True)


def to_width(text: str, stream: TextIO) -> str:
    """Return a text with lines broken between words, where the stream is a narrower terminal."""
    if "\n" in text or len(text) <= _NARROW or not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, _NARROW)
    if len(text) <= width:
        return text
    indent = " " * (len(text) - len(text.lstrip())) + "  "
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False, expand_tabs=False,
    )  # fmt: skip


_NARROW = 40  # columns: in fewer nothing is broken


def _hear_nothing() -> None:
    with contextlib.suppress(ValueError):  # forked in another thread than the main one
        signal.set_wakeup_fd(-1)


def _discard(stream: TextIO) -> None:
    """Let a stream lead nowhere, also what is in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere, stream.fileno())
        stream.flush()
    os.close(nowhere)


def open_closed_streams() -> None:
    """Let closed standard streams lead nowhere.

    The next files that are opened would else take their numbers, and a library that prints a
    warning would write it into a cache.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            stream = open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


ENDING = Ending()
"""That of this process."""
