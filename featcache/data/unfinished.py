"""A listing of a store that was interrupted: kept for an hour, so that the next one goes on there.

Reads and writes: a file in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``), which
only the user can read and the next listing removes. Most listings write nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from featcache.data.store_requests import Found

_HOUR = 3600.0


def place_of(what: str) -> Path:
    """Return where the unfinished listing of something is kept.

    Args:
        what: All that decides what is listed: the URL, and the address behind it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(home, "featcache", f"listing-{name}.jsonl")


def keep(place: Path, after: str, found: list[Found]) -> bool:
    """Write down what was listed before a key; return whether that could be done."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="ascii") as file:  # noqa: PTH123 (of a handle)
            file.writelines(f"{json.dumps(one)}\n" for one in found)
            file.write(f"{json.dumps({'after': after})}\n")  # last: without it the file is cut off
        part.replace(place)
        return True
    return False


def take(place: Path) -> tuple[str, list[Found]]:
    """Return the key to go on after and what was listed before it, and remove the file.

    Returns "" and nothing where there is none, or an old or damaged one.
    """
    try:
        is_old = time.time() - place.stat().st_mtime > _HOUR
        lines = [] if is_old else place.read_text("ascii").splitlines()
        place.unlink()
        if not lines:
            return "", []
        *objects, last = map(json.loads, lines)
        return str(last["after"]), [Found(str(n), int(b), str(t)) for n, b, t in objects]
    except (OSError, ValueError, TypeError, KeyError):
        return "", []
