"""What a verb makes for a URL: made in a folder here, sent when it is whole.

The folder is ``work/HASH OF THE URL/`` beside the local copies; who works in it holds its lock. The
files in it are all the state there is. A kill at any moment leaves one of these to the next command
of that URL:

* begun: ``work.json`` (tags of what is in the store, stamps of the files here) and ``NAME``, linked
  to the local copy, if anything is in the store. The next command begins with what is there then.
* unfinished: ``NAME.partial`` or ``NAME.sweep`` too. Likewise, and the verb goes on with these.
* made: the stamp of ``NAME`` is another. The next command sends it, then works as if it had always
  been in the store. If it is told to replace what is there, the verb replaces this too.
* uploading, of a run: ``uploading.json`` too, and the same in the store. Likewise: what is in the
  store is removed, and the run sent again, whole.
* sent: ``NAME`` is the local copy, and the folder is gone, or without ``work.json``.

What is sent replaces only what the work began with. If something else is found, it may be just what
was made, sent by a command that was killed before it could note that; else the sender is told, and
what was made stays. Of a run ``uploading.json`` is sent first and removed last, and is another's
unless its bytes are ours; ``run.json`` is the last of the files. A cache is one object; what goes
with it is sent before it.

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
    record_of,
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

R = TypeVar("R")

_BEGUN = "work.json"
_MAX_JSON_BYTES = 1 << 28


class Work:
    """What a verb makes for a URL, in a folder here.

    Args:
        url: Where it will be.
        options: The verb's.

    Attributes:
        url: Where it will be.
        path: Where it is made.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        options = options or {}
        self.url, self.path = url, place_of(url, "work")
        self._say: Say = options.get("say", log_line)
        self._replace = bool(options.get("overwrite") or options.get("rebuild"))

    def make(self, verb: Callable[[], R], *, sends: bool) -> R:
        """Return what the verb returns, after what it made was sent; else only look at its work."""
        make_place(self.folder)
        with writer_lock(self.folder / LOCK_NAME, self.url):
            try:
                if sends:
                    check_writable(self.url)
                self._begin(sends=sends)
                result = verb()
                if sends and self.is_made():
                    self._send()
            finally:
                if not self.is_made() and not self._find_unfinished():
                    shutil.rmtree(self.folder, ignore_errors=True)
        return moved_to_copy(result, self.path, self.url)

    def is_made(self) -> bool:
        """Return whether something is made, whole, and not known to be sent.

        Verbs give what they make its name when it is whole: what it is known by is another then.
        """
        begun = self._begun()
        stamps, before = files_of(self.path), begun.get("stamps", {})
        known_by = [name for name in ("", *WHOLE) if name in stamps]
        return bool(begun) and any([*stamps[name]] != before.get(name) for name in known_by)

    @property
    def folder(self) -> Path:
        """Where all that belongs to the work lies."""
        return self.path.parent

    def _begun(self) -> dict[str, Any]:
        """Return what was there when the work began, nothing if there is none.

        Under ``tags`` those in the store, under ``stamps`` those of the files here, by path.
        """
        return optional_json_object(self.folder / _BEGUN, max_bytes=_MAX_JSON_BYTES)

    def _find_unfinished(self) -> list[Path]:
        beside = [path for path in self.folder.iterdir() if path != self.path]
        return [path for path in beside if path.name.endswith((".partial", ".sweep"))]

    def _begin(self, *, sends: bool) -> None:
        """Send what an earlier command made, if any; then begin with what is in the store now."""
        if self.is_made():
            if not sends:
                return
            if not self._replace:
                self._say(f"sends what an earlier command made, kept in {self.folder}")
                self._send()
        objects, unfinished = find_objects(self.url), self._find_unfinished()
        if MARKER in objects and not self._replace:
            raise DataError(
                "URL", expected="nothing, or a whole run", where=self.url,
                found="a run whose upload has not ended",
                hint="Wait for it, or replace it with --overwrite",
            )  # fmt: skip
        tags, begun = _tags(objects), self._begun()
        is_known = self._is_marked(objects) or tags.items() <= begun.get("tags", {}).items()
        if self.is_made() and is_known:  # the verb replaces what was made, unless it refuses to
            stamps = begun["stamps"]
        else:
            self._clear(unfinished)
            copy = None if MARKER in objects else fetch(self.url)
            tags, stamps = (tags, {}) if copy is None else (copy.tags, link(copy, self.path))
        begun = {"url": without_secrets(self.url), "tags": tags, "stamps": stamps}
        write_json(self.folder / _BEGUN, begun)
        if unfinished:
            self._say(f"goes on with what is kept in {self.folder}")
        elif sends:
            self._say(f"{printable(self.url)}: made in {self.folder}, then sent")

    def _clear(self, kept: list[Path]) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK_NAME and path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _send(self) -> None:
        """Send what was made: it becomes the local copy."""
        tags = None
        try:
            tags = self._send_folder() if self.path.is_dir() else self._send_cache()
        except ObjectChangedError as error:
            if not self._is_sent():
                raise CacheError(
                    "URL", expected="what was there when the work began", where=self.url,
                    found="something that was written in the meantime",
                    hint=f"What was made here is kept in {self.folder}: replace the other with "
                    "--overwrite (--rebuild for a cache), or delete that folder",
                ) from error  # fmt: skip
        except FeatcacheError:
            self._say(f"what was made is whole and kept in {self.folder}; not sent")
            raise
        (self.folder / _BEGUN).unlink()  # a kill from here on leaves nothing to go on with
        if tags is not None:
            shutil.rmtree(place_of(self.url).parent, ignore_errors=True)
            become_copy(self.url, self.path, tags)

    def _send_cache(self) -> dict[str, str]:
        """Send a cache after what goes with it, as far as it is new; return the tags."""
        begun, stamps = self._begun(), files_of(self.path)
        tags = begun["tags"] if begun["tags"] and find_objects(self.url) else {}
        new = [below for below in stamps if [*stamps[below]] != begun["stamps"].get(below)]
        sent = {below: tag for below, tag in tags.items() if below in stamps}
        with sending(self.path, new) as moved:
            for below in sorted(new, reverse=True):
                was = ANY if below else tags.get(below)
                sent[below] = send_file(self.url, self.path, below, was, moved)
        return sent

    def _send_folder(self) -> dict[str, str]:
        """Send a folder, which is recognisably not whole meanwhile; return the tags."""
        objects, names = find_objects(self.url), files_of(self.path)
        if not self._is_marked(objects):
            if objects and _tags(objects) != self._begun()["tags"]:
                raise ObjectChangedError
            self._mark(objects)
        for below in sorted(objects.keys() - {MARKER}, key=_order, reverse=True):
            remove_object(f"{self.url}/{below}")
        with sending(self.path, [*names]) as moved:
            tags = {
                below: send_file(self.url, self.path, below, None, moved)
                for below in sorted(names, key=_order)
            }
        if not self._is_marked(find_objects(self.url)):
            raise ObjectChangedError
        remove_object(f"{self.url}/{MARKER}")
        return tags

    def _mark(self, objects: Mapping[str, RemoteFile]) -> None:
        """Say in the store that an upload has begun, in words that only we can have written."""
        mark = self.folder / MARKER
        if not mark.exists():
            write_json(mark, {
                "token": secrets.token_hex(16), "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            })  # fmt: skip
        was = objects[MARKER].tag if MARKER in objects else None
        with one_line("URL", self.url):
            send_object(mark, f"{self.url}/{MARKER}", was, lambda _: None)

    def _is_marked(self, objects: Mapping[str, RemoteFile]) -> bool:
        """Whether the upload that has begun in the store is ours."""
        mark, there = self.folder / MARKER, objects.get(MARKER)
        if there is None or not mark.is_file() or mark.stat().st_size != there.num_bytes:
            return False
        with one_line("URL", there.url):
            return there.read(0, there.num_bytes) == mark.read_bytes()

    def _is_sent(self) -> bool:
        """Whether the store has what was made: the answer was lost, or the sender killed."""
        copy = None
        with contextlib.suppress(DataError):
            copy = fetch(self.url)
        if copy is None:
            return False
        is_run = self.path.is_dir()
        names = files_of(self.path) if is_run else [""]
        return (not is_run or copy.tags.keys() == {*names}) and all(
            sha256_file(local_file(self.path, below)) == sha256_file(local_file(copy.path, below))
            for below in names
        )


def _tags(objects: Mapping[str, RemoteFile]) -> dict[str, str]:
    return {below: file.tag for below, file in objects.items()}


def _order(below: str) -> tuple[bool, int]:
    """Return a key: what a folder is known by comes last, that of the top at the very end."""
    return below.rpartition("/")[2] in WHOLE, -below.count("/")


def moved_to_copy(result: R, made: Path, url: str) -> R:
    """Return a verb's result with the local copy in place of where the verb worked."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            value = getattr(result, field.name)
            if isinstance(value, Path) and value.is_relative_to(made):
                object.__setattr__(result, field.name, place_of(url) / value.relative_to(made))
    return result


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


def become_copy(url: str, path: Path, tags: Mapping[str, str]) -> None:
    """Move files that were sent into the local copy, so that they are not fetched again.

    Args:
        url: Of the whole cache or run.
        path: Where that lay when it was sent.
        tags: Path below the URL of what was sent -> its tag in the store.
    """
    copy = place_of(url)
    files = record_of(copy)
    for below, tag in tags.items():
        source, target = local_file(path, below), local_file(copy, below)
        files[below] = {"tag": tag, "sha256": sha256_file(source), "stamp": stamp_of(source)}
        make_folder(target.parent)
        source.replace(target)
    keep_record(copy, url, files)


@contextlib.contextmanager
def sending(path: Path, names: list[str]) -> Iterator[Callable[[int], None]]:
    """Show how much of some files has gone."""
    total = sum(local_file(path, below).stat().st_size for below in names)
    with progress.Progress("send", "MB", max(round(total / 1e6), 1), shown=progress.OF_URLS) as bar:
        yield lambda num_bytes: bar.move_by(num_bytes / 1e6)
