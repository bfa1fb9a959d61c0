"""What a verb makes for a URL: made in a folder here, sent when it is whole.

The folder, ``work/HASH OF THE URL/`` beside the local copies, is found again by the same command,
and goes when all is sent: what was made becomes the local copy. Its ``work.json`` says which
version of the object the work began with (``base``), what its files looked like then (``stamps``),
and whether the verb has come to its end (``is_whole``).

A cache is one object, replaced only if it is still the one that the work began with. A run is sent
with ``uploading.json`` first, ``run.json`` last, and is none in between.

Reads and writes: objects of a store, through ``data.objects``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from featcache import progress
from featcache.cache.remote_copies import (
    MARKER,
    WHOLE,
    Copy,
    Stamp,
    fetch,
    files_of,
    keep_record,
    local_file,
    make_place,
    place_of,
    stamp_of,
)
from featcache.data.objects import (
    ANY,
    Moved,
    ObjectChangedError,
    check_writable,
    find_objects,
    one_line,
    remove_object,
    send_object,
)
from featcache.data.remote import RemoteFile
from featcache.errors import CacheError, DataError, FeatcacheError, printable, without_secrets
from featcache.files import make_folder, optional_json_object, sha256_file, write_json
from featcache.locking import LOCK_NAME, writer_lock
from featcache.runtime import Say, log_line
from featcache.untrusted import parse_json_object

R = TypeVar("R")

_MAX_JSON_BYTES = 1 << 28


def is_made(url: str) -> bool:
    """Return whether something is made for a URL and not yet sent."""
    path = place_of(url, "work")
    return _is_changed(path, optional_json_object(_facts_of(path), max_bytes=_MAX_JSON_BYTES))


def _is_changed(path: Path, state: Mapping[str, Any]) -> bool:
    return bool(state) and files_of(path) != _stamps_of(state)


def _stamps_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {below: tuple(stamp) for below, stamp in state.get("stamps", {}).items()}


def _facts_of(path: Path) -> Path:
    return path.parent / "work.json"


class Work:
    """What a verb makes for a URL, in a folder here.

    Attributes:
        url: Where it will be.
        path: Where it is made.
    """

    def __init__(self, url: str, given: Mapping[str, Any], *, goes_on: bool) -> None:
        options = {**given, **given.get("options", {})}
        self.url, self.path, self._goes_on = url, place_of(url, "work"), goes_on
        self._say: Say = options.get("say", log_line)
        self._replace = bool(options.get("overwrite") or options.get("rebuild"))
        self._facts = _facts_of(self.path)
        self._state: dict[str, Any] = {}

    @contextlib.contextmanager
    def held(self, *, sends: bool) -> Iterator[None]:
        """Hold the lock of the folder; leave it behind only where something of use is in it."""
        folder = self.path.parent
        make_place(folder)
        with writer_lock(folder / LOCK_NAME, self.url):
            self._state = optional_json_object(self._facts, max_bytes=_MAX_JSON_BYTES)
            try:
                if sends:
                    check_writable(self.url)
                self._begin(sends=sends)
                yield
            finally:
                if not self._is_changed() and not self._has_unfinished():
                    shutil.rmtree(folder, ignore_errors=True)

    def run(self, verb: Callable[[], R]) -> R:
        """Return what the verb returns, after what it made was sent."""
        result = verb()
        if self._is_changed():
            self._keep(is_whole=True)
            try:
                self._send()
            except ObjectChangedError as error:
                raise self._conflict() from error
            except FeatcacheError as error:
                self._say(f"what was made is whole and kept in {self.path.parent}; not sent")
                raise error
        return moved_to_copy(result, self.path, self.url)

    def _begin(self, *, sends: bool) -> None:
        """Go on with what is here, or begin anew."""
        objects = find_objects(self.url)
        if not self._state:
            self._refuse_cut_upload(objects)
            self._begin_anew()
        elif _marker_of(objects) != self._state["token"] and self._tags_of(objects) != self._base:
            self._meet_another(objects)
        elif self._is_changed() and not self._goes_on:
            if self._state.get("is_whole") and not self._replace:
                raise CacheError(
                    self.url, expected="nothing that waits to be sent", where=self.path.parent,
                    found="what a command made and could not send",
                    hint="It is whole: copy it to where you want it, or make it again with "
                    "--overwrite (--rebuild for a cache)",
                )  # fmt: skip
            self._begin_anew()
        if self._is_changed() or self._has_unfinished():
            self._say(f"goes on with what is kept in {self.path.parent}")
        elif sends:
            self._say(f"{printable(self.url)}: made in {self.path.parent}, then sent")

    def _refuse_cut_upload(self, objects: Mapping[str, RemoteFile]) -> None:
        if MARKER in objects and not self._replace:
            raise DataError(
                "URL", expected="nothing, or a whole run", where=self.url,
                found="a run whose upload has not ended",
                hint="Wait for it, or replace it with --overwrite",
            )  # fmt: skip

    def _begin_anew(self) -> None:
        """Begin with what is in the store now."""
        for path in self.path.parent.iterdir():
            if path.name != LOCK_NAME and not self._is_unfinished(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        objects = find_objects(self.url)
        copy = None if MARKER in objects else fetch(self.url)
        stamps = {} if copy is None else link(copy, self.path)
        tags = self._tags_of(objects) if copy is None else copy.tags
        self._state = {"url": without_secrets(self.url), "token": secrets.token_hex(16)}
        self._keep(base=tags, stamps=stamps)

    def _meet_another(self, objects: Mapping[str, RemoteFile]) -> None:
        """Decide what to do where the store has another version than the work began with."""
        if not self._is_changed():
            self._refuse_cut_upload(objects)
            self._begin_anew()
            return
        if self._is_sent():
            self._keep(base=self._tags_of(objects), stamps=files_of(self.path))
        elif self._replace or not objects:
            self._keep(base=self._tags_of(objects))
        else:
            raise self._conflict()

    def _is_sent(self) -> bool:
        """Whether the store has what was made: an answer was lost, or the end of the sender."""
        copy = None
        with contextlib.suppress(DataError):
            copy = fetch(self.url)
        if copy is None or copy.tags.keys() != files_of(self.path).keys():
            return False
        return all(
            sha256_file(local_file(self.path, below)) == sha256_file(local_file(copy.path, below))
            for below in copy.tags
        )

    def _conflict(self) -> CacheError:
        return CacheError(
            "URL", expected="what was there when the work began", where=self.url,
            found="something that was written in the meantime",
            hint=f"What was made here is kept in {self.path.parent}: replace the other with "
            "--overwrite (--rebuild for a cache), or delete that folder",
        )  # fmt: skip

    @property
    def _base(self) -> dict[str, str]:
        return dict(self._state["base"])

    def _tags_of(self, objects: Mapping[str, RemoteFile]) -> dict[str, str]:
        tags = {below: file.tag for below, file in objects.items()}
        if "" in tags:  # what goes with a cache is as it is
            tags |= {end: tag for end, tag in self._state.get("base", {}).items() if end}
        return tags

    def _keep(self, **facts: Any) -> None:
        self._state |= facts
        write_json(self._facts, self._state)

    def _is_changed(self) -> bool:
        return _is_changed(self.path, self._state)

    def _is_unfinished(self, path: Path) -> bool:
        return path.name.startswith(self.path.name) and path.name.endswith((".partial", ".sweep"))

    def _has_unfinished(self) -> bool:
        return any(map(self._is_unfinished, self.path.parent.iterdir()))

    def _send(self) -> None:
        """Send all that is new: a cache in one piece, of a folder what it is known by last."""
        stamps, before = files_of(self.path), _stamps_of(self._state)
        changed = [below for below, stamp in stamps.items() if before.get(below) != stamp]
        changed = [*stamps] if self.path.is_dir() else changed
        with sending(self.path, changed) as moved:
            if self.path.is_dir():
                tags = self._send_folder(stamps, moved)
            else:
                tags = self._base
                for below in changed:
                    was = ANY if below else tags.get(below)
                    tags[below] = send_file(self.url, self.path, below, was, moved)
        files = {below: local_file(self.path, below) for below in tags}
        facts = {below: (sha256_file(file), stamp_of(file)) for below, file in files.items()}
        self._facts.unlink()  # all is sent: a kill from here on leaves nothing to go on with
        self._state = {}
        copy = place_of(self.url)
        shutil.rmtree(copy.parent, ignore_errors=True)
        make_folder(copy.parent)
        for path in [self.path, *files.values()]:
            if path.exists() and path.parent == self.path.parent:
                path.replace(copy.with_name(path.name))
        keep_record(copy, self.url, tags, facts)

    def _send_folder(self, stamps: Mapping[str, Stamp], moved: Moved) -> dict[str, str]:
        """Send a folder, whole or recognisably not whole."""
        objects = find_objects(self.url)
        is_own = _marker_of(objects) == self._state["token"]
        if not is_own:
            others = {below for below in objects if below != MARKER}
            if {below: objects[below].tag for below in others} != {
                below: tag for below, tag in self._base.items() if below != MARKER
            }:
                raise ObjectChangedError
            self._mark(ANY if MARKER in objects and self._replace else None)
            for below in sorted(others, key=_order, reverse=True):
                remove_object(f"{self.url}/{below}")
        for below in objects.keys() - stamps.keys() - {MARKER} if is_own else ():
            remove_object(f"{self.url}/{below}")
        tags = {}
        for below in sorted(stamps, key=_order):
            tags[below] = send_file(self.url, self.path, below, ANY if is_own else None, moved)
        remove_object(f"{self.url}/{MARKER}")
        return tags

    def _mark(self, was: str | None) -> None:
        marker = self.path.parent / MARKER
        write_json(marker, {
            "token": self._state["token"], "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        })  # fmt: skip
        with one_line("URL", self.url):
            send_object(marker, f"{self.url}/{MARKER}", was, lambda _: None)
        marker.unlink()


def moved_to_copy(result: R, made: Path, url: str) -> R:
    """Return a verb's result with the local copy in place of where the verb worked."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            if isinstance(value, Path) and value.is_relative_to(made):
                object.__setattr__(result, field.name, place_of(url) / value.relative_to(made))
    return result


def _marker_of(objects: Mapping[str, RemoteFile]) -> str | None:
    """Return the token of the sender whose upload has not ended, None if there is none."""
    if MARKER not in objects:
        return None
    file = objects[MARKER]
    with contextlib.suppress(OSError, ValueError):
        return str(parse_json_object(file.read(0, min(file.num_bytes, 1 << 16))).get("token"))
    return ""


def _order(below: str) -> tuple[bool, int]:
    """Return a key: what a folder is known by comes last, that of the top at the very end."""
    return below.rpartition("/")[2] in WHOLE, -below.count("/")


def send_file(url: str, path: Path, below: str, was: str | None, moved: Moved) -> str:
    """Send a file of a cache or run, and return the tag that it has in the store.

    Args:
        url: Of the whole cache or run.
        path: Where that lies here.
        below: The file's path in it.
        was: The tag of what is replaced: see ``send_object``.
        moved: Told how much has gone.
    """
    source = local_file(path, below)
    place = url + below if not path.is_dir() else f"{url}/{below}"
    with one_line("URL", place):
        return send_object(source, place, was, moved).tag


def link(copy: Copy, path: Path) -> dict[str, Stamp]:
    """Fill a folder with the files of a copy, or give a cache a second name; return the stamps."""
    make_folder(path.parent)
    for below in copy.tags:
        source, target = local_file(copy.path, below), local_file(path, below)
        make_folder(target.parent)
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copy2(source, target)
    return files_of(path)


@contextlib.contextmanager
def sending(path: Path, names: list[str]) -> Iterator[Callable[[int], None]]:
    """Show how much of some files has gone."""
    total = sum(local_file(path, below).stat().st_size for below in names)
    with progress.Progress("send", "MB", max(round(total / 1e6), 1), shown=progress.OF_URLS) as bar:
        yield lambda num_bytes: bar.move_by(num_bytes / 1e6)
