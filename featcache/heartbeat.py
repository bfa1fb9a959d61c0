"""Who is at work in a folder that hosts share, where files cannot be locked: signs of life.

A process makes a file with O_EXCL and writes to it every few seconds. Clocks are not compared: a
file that does not change while one looks at it for a minute is of a process that is dead.

Reads and writes: ``OUTPUT.partial/alive.N``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from featcache.errors import CacheError
from featcache.files import disk_error, make_folder
from featcache.runtime import Say

BEAT_SECONDS = 5.0
"""Between two signs of life."""
STALE_SECONDS = 60.0
"""Without one, a process is taken for dead."""


def sign_of(folder: Path, number: int) -> Path:
    """Return the sign of life of a part; of the plain command that merges them, number 0."""
    return folder / f"alive.{number}"


def signs_in(folder: Path, name: str) -> dict[Path, str]:
    """Return the signs of life in a folder -> what their processes are at, for messages.

    Args:
        folder: ``CACHE.partial``.
        name: Of the cache.
    """
    found = {}
    for path in sorted(folder.glob("alive.*")):
        number = path.name.removeprefix("alive.")
        if number.isdecimal():  # else one that is being removed
            found[path] = f"part {number} of {name}" if int(number) else f"cache {name}"
    return found


def _own_sign() -> str:
    """Return a line that names this process, and no other one of this or any host."""
    space = ""
    with contextlib.suppress(OSError):
        space = Path("/proc/self/ns/pid").readlink().as_posix()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since} {space}"


def _is_known_dead(sign: str) -> bool:
    """Return whether a sign is of a process of this machine that is no more."""
    mine, found = _own_sign().split(" "), sign.split(" ")
    is_here = len(mine) == len(found) and (mine[3], mine[-1]) == (found[3], found[-1])
    if sys.platform != "linux" or not is_here or not mine[-1]:
        return False
    return found[1].isdecimal() and not Path("/proc", found[1]).exists()


def _read_sign(path: Path) -> tuple[str, ...] | None:
    """Return what a sign of life says, token and number of beats included; None without one."""
    try:
        # opened anew: what a network file system has cached is asked for again
        return tuple(path.read_text("utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return None


def _name_of(lines: tuple[str, ...]) -> str:
    return " ".join(lines[0].split(" ")[:-1]) if lines else "a process that has just begun"


def refuse_alive(paths: Mapping[Path, str], say: Say) -> dict[Path, tuple[str, ...]]:
    """Wait until all signs of life are gone or known to be of dead processes.

    Args:
        paths: File -> what its process is at, for messages.
        say: Called once if that cannot be told at once.

    Returns:
        The signs of the dead.

    Raises:
        CacheError: If one changes: its process is at work.
    """
    dead = {path: lines for path in paths if (lines := _read_sign(path)) is not None}
    seen = {p: lines for p, lines in dead.items() if not (lines and _is_known_dead(lines[0]))}
    if not seen:
        return dead
    named = "; ".join(f"{paths[path]} by {_name_of(lines)}" for path, lines in seen.items())
    say(f"Waiting for a sign of life, {STALE_SECONDS:.0f} s at most: {named}.")
    deadline = time.monotonic() + STALE_SECONDS
    while seen and time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        for path, before in list(seen.items()):
            now = _read_sign(path)
            if now is None:
                del seen[path], dead[path]
            elif now != before:
                raise CacheError(
                    paths[path], expected="no other process at it",
                    found=f"one at work: {_name_of(now)}", where=path,
                    hint="Wait for it, or stop it",
                )  # fmt: skip
    return dead


@contextlib.contextmanager
def alive(path: Path, what: str, say: Say) -> Iterator[Callable[[], None]]:
    """Say by a file that this process is at work; yield a function that refuses where it is not.

    Args:
        path: The file. It is removed at the end.
        what: What the process is at, for messages.
        say: Called if it takes a while to tell whether another process is at it.

    Raises:
        CacheError: If another process is at it, or the disk is full. The function raises it where
            another process has taken this one for dead: it was stopped for longer than a minute.
    """
    token, sign = secrets.token_hex(8), _own_sign()
    make_folder(path.parent)
    while True:
        try:
            _make_sign(path, f"{sign}\n{token}\n0\n")
            break
        except FileExistsError:
            if (dead := refuse_alive({path: what}, say).get(path)) is not None:
                _bury(path, dead)
    is_over, is_lost = threading.Event(), threading.Event()

    def is_mine() -> bool:
        lines = _read_sign(path)
        return lines is not None and token in lines

    def beat() -> None:
        number = 0
        while not is_over.wait(BEAT_SECONDS):
            number += 1
            with contextlib.suppress(OSError):  # of the network: it may pass
                if not is_mine():
                    is_lost.set()
                    return
                with path.open("r+", encoding="utf-8") as file:
                    file.write(f"{sign}\n{token}\n{number}\n")

    def check() -> None:
        if is_lost.is_set():
            raise CacheError(
                what, expected=f"the sign of life of this process, {path.name}", where=path,
                found="none, or that of another process, which took this one for dead",
                hint="That one goes on; nothing is lost",
            )  # fmt: skip

    thread = threading.Thread(target=beat, name="featcache-alive", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        is_over.set()
        thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError):
            if is_mine():
                path.unlink()


def _make_sign(path: Path, text: str) -> None:
    """Make a sign of life; on a full disk leave none, which would be waited for.

    Raises:
        FileExistsError: If there is one.
        CacheError: If the disk is full or the folder cannot be written.
    """
    is_made = False
    try:
        with path.open("x", encoding="utf-8") as file:
            is_made = True
            file.write(text)
    except FileExistsError:
        raise
    except OSError as error:
        if is_made:
            path.unlink(missing_ok=True)
        raise disk_error(error, path, len(text)) from error


def _bury(path: Path, seen: tuple[str, ...]) -> None:
    """Remove the sign of a dead process; another process may be doing the same."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _read_sign(aside) != seen:  # a living one's, which was made in between
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()
