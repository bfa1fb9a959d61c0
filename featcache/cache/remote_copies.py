"""Local copies of caches and runs that lie in a store: fetched once, checked, used again.

A copy lies in ``FEATCACHE_COPIES`` (default: ``featcache/urls`` in the user's cache folder), in
``read/HASH OF THE URL/``, beside ``copy.json``: tag and sha256 of each object, and size, time and
inode of the file made of it. It is used again while tags and files are these. All of it may be
deleted at any time.

Of a folder the listing is the same before and after its objects were read, and there is no
``uploading.json``: a sender (see ``remote_work``) writes that first and removes it last.

Reads: objects of a store. Writes: copies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featcache import progress
from featcache.data.objects import (
    CHUNK_BYTES,
    NUM_AT_ONCE,
    WHOLE_PUTS,
    ObjectChangedError,
    fetch_object,
    find_objects,
)
from featcache.data.remote import RemoteFile, url_of
from featcache.errors import COPIES, CacheError, DataError, RunError, without_secrets
from featcache.files import disk_error, make_folder, optional_json_object, sha256_file, write_json
from featcache.untrusted import real_path

MARKER = "uploading.json"
"""In a folder of a store whose upload has begun and not ended."""

BESIDE = (".audit.json", ".dicom.csv")
"""Endings of files beside a cache that go with it."""

WHOLE = ("run.json", "crossval.json")
"""What a run and a cross-validation are known by."""

_STORES = WHOLE_PUTS | {"memory", "local"}
_MAX_JSON_BYTES = 1 << 28
_NUM_TRIES = 3  # of an object that changes while it is read
_MB = 1e6
_OURS = {"lock", "copy.json", "work.json", MARKER}  # lie beside a copy, or what is made
_SPACE = ' \\<>:"|?*\x00-\x1f'

Stamp = tuple[int, int, int]
"""Size, time and inode of a file: tells it from every other."""

Facts = tuple[str, Stamp | None]
"""sha256 and stamp of a copied file."""


_used: ContextVar[list[Copy] | None] = ContextVar("_used", default=None)


@dataclass(frozen=True)
class Copy:
    """A local copy.

    Attributes:
        url: Of what it is one.
        path: The file or folder.
        tags: Path below the URL -> tag of each object; "" for a file itself.
        reused: Path below the URL -> sha256, of those that were not fetched now.
    """

    url: str
    path: Path
    tags: dict[str, str]
    reused: dict[str, str] = field(default_factory=dict)

    def refuse_damage(self) -> None:
        """Forget the copy, and say so, where a file is no longer what was fetched.

        Raises:
            CacheError: If that is so.
        """
        for below, sha256 in self.reused.items():
            file = local_file(self.path, below)
            if stamp_of(file) is None or sha256_file(file) != sha256:
                (self.path.parent / "copy.json").unlink(missing_ok=True)
                raise CacheError(
                    "local copy", expected="the bytes that were fetched", where=self.url,
                    found=f"others in {file.name}",
                    hint="Run the same command again: it is fetched anew",
                )  # fmt: skip


@contextlib.contextmanager
def damage_told() -> Iterator[None]:
    """Where a cache or run is refused, say so if the copy, and not the original, is what is wrong.

    Raises:
        CacheError: If one that was used here is no longer what was fetched; next time it will be
            fetched anew.
    """
    used: list[Copy] = []
    token = _used.set(used)
    try:
        yield
    except (CacheError, RunError):
        for copy in used:
            copy.refuse_damage()
        raise
    finally:
        _used.reset(token)


def place_of(url: str, kind: str = "read") -> Path:
    """Return where the copy of a URL lies or would lie, and call it by its URL in messages."""
    root = os.environ.get("FEATCACHE_COPIES")
    if not root:
        home = os.environ.get("XDG_CACHE_HOME") or (
            os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
        )
        root = os.path.join(home or Path.home() / ".cache", "featcache", "urls")  # noqa: PTH118
    name = re.sub(f"[{_SPACE}]", "_", _path_in(url).rpartition("/")[2])[-50:]  # of 4 bytes each
    name = f"copy{name}" if not name.strip(".") or name in _OURS else name
    digest = hashlib.sha256(url.encode()).hexdigest()[:32]
    path = real_path(Path(root)) / kind / digest / name
    COPIES[str(path)] = url
    return path


def make_place(folder: Path) -> None:
    """Make the folder around a ``place_of``; that of all copies, where it is new, is private.

    Copies have names of patients in them, and a bucket is read by fewer than a disk.
    """
    root = folder.parents[1]
    if not root.exists():
        make_folder(root.parent)
        root.mkdir(mode=0o700, exist_ok=True)
    make_folder(folder)


def url_of_copy(path: Path) -> str | None:
    """Return the URL of a local copy, or of what lies in one; None for any other path."""
    if not COPIES:
        return None
    place = real_path(path)
    for one in (place, *place.parents):
        if url := COPIES.get(str(one)):
            below = place.relative_to(one).as_posix()
            return url if below == "." else f"{url}/{below}"
    return None


def _path_in(url: str) -> str:
    """Return the path of a URL: only on web servers ``?`` and ``#`` end it."""
    if url.startswith(("http:", "https:")):
        return urlsplit(url).path
    return url.partition("://")[2].partition("/")[2]


def place_from(cache: Path, run: Path) -> str | None:
    """Return what ``run.json`` says of where a cache lies, if it or the run lies in a store.

    A path relative to the run where both lie in one bucket, else the URL, or the absolute path.
    """
    cache_url, run_url = url_of_copy(cache), url_of_copy(run)
    if cache_url is None:
        return None if run_url is None else real_path(cache).as_posix()
    if run_url is not None and urlsplit(cache_url)[:2] == urlsplit(run_url)[:2]:
        paths = [f"/{_path_in(url).strip('/')}" for url in (cache_url, run_url)]
        return posixpath.relpath(*paths)
    return without_secrets(cache_url)


def url_from(run: Path, place: str) -> str | None:
    """Return the URL that ``run.json`` means by a cache's place; None if it is a local path.

    None too for a URL of a server: whoever made the run could have any of them asked.
    """
    run_url = url_of_copy(run)
    if url := url_of(place):
        is_near = run_url is not None and urlsplit(url)[:2] == urlsplit(run_url)[:2]
        return url if is_near or urlsplit(url).scheme in _STORES else None
    if run_url is None or Path(place).is_absolute():
        return None
    parts = urlsplit(run_url)
    path = posixpath.normpath(posixpath.join(f"/{_path_in(run_url).strip('/')}", place))
    return f"{parts.scheme}://{parts.netloc}{path}"


def fetch(url: str, *, max_bytes: int | None = None) -> Copy | None:
    """Return a local copy of a cache, a run or a folder of them, as they are in the store now.

    Args:
        url: Of the file or folder, without a ``/`` at its end.
        max_bytes: Fetch nothing where more than this is missing here.

    Returns:
        The copy; None if nothing is there, or too much would have to be fetched.

    Raises:
        DataError: If the store refuses or cannot be reached, or something else is there.
        CacheError: If the disk is full.
    """
    for _ in range(_NUM_TRIES):
        with contextlib.suppress(ObjectChangedError):
            objects = find_objects(url)
            if not objects:
                return None
            copy = _fetch(url, _choose(url, objects), max_bytes)
            if copy is not None and (used := _used.get()) is not None:
                used.append(copy)
            return copy
    raise DataError(
        "URL", expected="objects that stay as they are", where=url,
        found=f"others each of {_NUM_TRIES} times they were read",
        hint="Run the same command again when nobody writes there",
    )  # fmt: skip


def _choose(url: str, objects: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Return what to fetch: a file with what goes with it, a run, or a folder's caches."""
    if "" in objects:
        beside = {end: find_objects(url + end).get("") for end in BESIDE[:1]}
        return {**objects, **{end: file for end, file in beside.items() if file is not None}}
    for below in objects:
        if any(part in {"", ".", ".."} or re.search(r"[\\\0]", part) for part in below.split("/")):
            raise DataError("URL", expected="names of files", found=below, where=url)
    if MARKER in objects:
        raise DataError(
            "URL", expected="a whole run", found="one whose upload has not ended", where=url,
            hint="Wait for it; if it was interrupted, the same command sends it where it was made, "
            "and anywhere with --overwrite makes it again",
        )  # fmt: skip
    if any(name in objects for name in WHOLE):
        return dict(objects)
    caches = {below: f for below, f in objects.items() if "/" not in below and below[-3:] == ".h5"}
    if not caches:
        raise DataError(
            "URL", expected="a cache, a run, or a folder of caches", where=url,
            found=f"other objects, such as {min(objects)}", hint="Name one of those",
        )  # fmt: skip
    return caches


def _fetch(url: str, objects: Mapping[str, RemoteFile], max_bytes: int | None) -> Copy | None:
    path = place_of(url)
    reused = _still_here(path, objects)
    missing = {below: file for below, file in objects.items() if below not in reused}
    total = sum(file.num_bytes for file in missing.values())
    if max_bytes is not None and total > max_bytes:
        return None
    try:
        _clear(path, objects)
        if missing:
            make_place(path.parent)
            for below in missing:
                make_folder(local_file(path, below).parent)
            facts = reused | _fetch_all(path, missing, total)
            if "" not in objects and _tags(_choose(url, find_objects(url))) != _tags(objects):
                raise ObjectChangedError
            keep_record(path, url, {
                below: {"tag": file.tag, "sha256": facts[below][0], "stamp": facts[below][1]}
                for below, file in objects.items()
            })  # fmt: skip
    except OSError as error:
        raise disk_error(error, path.parent, total) from error
    return Copy(url, path, _tags(objects), {below: known[0] for below, known in reused.items()})


def _still_here(path: Path, objects: Mapping[str, RemoteFile]) -> dict[str, Facts]:
    """Return path below the URL -> facts of the objects whose copies can be used again."""
    found = dict[str, Facts]()
    with contextlib.suppress(KeyError, TypeError):  # edited
        for below, known in record_of(path).items():
            tag = objects[below].tag if below in objects else ""
            stamp = stamp_of(local_file(path, below))
            if tag and known["tag"] == tag and tuple(known["stamp"]) == stamp:
                found[below] = str(known["sha256"]), stamp
    return found


def _fetch_all(
    path: Path, missing: Mapping[str, RemoteFile], total: int
) -> dict[str, Facts]:  # fmt: skip
    """Fetch objects and return sha256 and stamp of each.

    Small ones are fetched several at once, larger ones in turn, in several stretches at once: in
    memory are 64 MiB at most, and not 512 MiB.

    A stamp is taken before the file gets its name: then another process may replace it, by an
    older version too.
    """
    stamps = dict[str, Stamp | None]()

    def fetch_one(below: str, file: RemoteFile) -> str:
        target = local_file(path, below)

        def publish(temporary: Path) -> None:
            stamps[below] = stamp_of(temporary)
            temporary.replace(target)

        return fetch_object(file, target, lambda n: bar.move_by(n / _MB), publish)

    small = {below: file for below, file in missing.items() if file.num_bytes <= CHUNK_BYTES}
    with progress.Progress(
        "fetch", "MB", max(round(total / _MB), 1), shown=progress.OF_URLS
    ) as bar:  # fmt: skip
        with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
            jobs = {below: threads.submit(fetch_one, below, file) for below, file in small.items()}
            try:
                sums = {below: job.result() for below, job in jobs.items()}
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
        sums |= {b: fetch_one(b, file) for b, file in missing.items() if b not in small}
    return {below: (sha256, stamps[below]) for below, sha256 in sums.items()}


def record_of(path: Path) -> dict[str, Any]:
    """Return what is noted of the files of a copy: path below the URL -> tag, sha256 and stamp."""
    record = optional_json_object(path.parent / "copy.json", max_bytes=_MAX_JSON_BYTES)
    return record["files"] if isinstance(record.get("files"), dict) else {}


def keep_record(path: Path, url: str, files: Mapping[str, Any]) -> None:
    """Note what a copy was made of, so that it is used again: see ``record_of``."""
    record = {"url": without_secrets(url), "files": files}
    write_json(path.parent / "copy.json", record)


def _clear(path: Path, objects: Mapping[str, RemoteFile]) -> None:
    """Remove what is here and not in the store."""
    if "" in objects:
        if path.is_dir():
            shutil.rmtree(path)
        for end in BESIDE:
            if end not in objects:
                local_file(path, end).unlink(missing_ok=True)
        return
    if path.is_file():
        path.unlink()
    for below in files_of(path):
        if below not in objects:
            local_file(path, below).unlink()


def files_of(path: Path) -> dict[str, Stamp]:
    """Return the files of a cache (with what goes with it) or a folder: path below it -> stamp."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    else:
        names = ["", *BESIDE]
    stamps = {below: stamp_of(local_file(path, below)) for below in sorted(names)}
    return {below: stamp for below, stamp in stamps.items() if stamp is not None}


def stamp_of(path: Path) -> Stamp | None:
    """Return what tells a file from every other, None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def local_file(path: Path, below: str) -> Path:
    """Return the local file of an object: in a folder, or beside a cache."""
    if not below:
        return path
    return path.with_name(path.name + below) if below in BESIDE else path / below


def _tags(objects: Mapping[str, RemoteFile]) -> dict[str, str]:
    return {below: file.tag for below, file in objects.items()}
