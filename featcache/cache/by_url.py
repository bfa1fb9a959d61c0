"""Let verbs read and write caches and runs by URL: the one place where they learn of URLs.

``by_url`` wraps a verb: what it reads is fetched (``remote_copies``), what it makes is made in a
folder here and sent when it is whole (``remote_work``), and files that it adds to a cache or a run
are sent one by one.

Reads and writes: objects of a store.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from featcache.cache.remote_copies import (
    WHOLE,
    Copy,
    Stamp,
    damage_told,
    fetch,
    files_of,
    make_place,
    place_of,
)
from featcache.cache.remote_work import (
    Work,
    become_copy,
    link,
    moved_to_copy,
    send_file,
    sending,
)
from featcache.data.objects import WHOLE_PUTS, ObjectChangedError, find_objects
from featcache.data.remote import url_of
from featcache.errors import (
    COPIES,
    CacheError,
    ConfigError,
    DataError,
    FeatcacheError,
    printable,
    warn_user,
)
from featcache.locking import LOCK_NAME, writer_lock

P = ParamSpec("P")
R = TypeVar("R")


def by_url(
    *reads: str,
    makes: str = "",
    adds_to: str = "",
    must_add: bool = True,
    replaces: bool = False,
    sends: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that lets arguments of a verb be URLs.

    Args:
        *reads: Names of arguments that are caches, runs or lists of them, and are only read.
        makes: The argument that names what the verb makes, whole, or brings up to date.
        adds_to: The argument that names a cache or run to which it may add files.
        must_add: What cannot be added is an error, not a warning.
        replaces: What is there is replaced without being told to, if it is of the same kind.
        sends: False of a verb that only looks at what it would make.
    """

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(verb)

        @functools.wraps(verb)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not any(map(_find_urls, (*args, *kwargs.values()))):
                return verb(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            made, added_to = (_url(given.get(name)) for name in (makes, adds_to))
            copies = dict[str, Copy]()
            with damage_told(), contextlib.ExitStack() as stack:
                for name in reads:
                    if name in given:
                        given[name] = _fetch_each(given[name], copies)
                if made:
                    _refuse_place(makes.upper(), made, copies)
                    options = {**given, **given.get("options", {})}
                    work = Work(made, options | {"overwrite": True} if replaces else options)
                    given[makes] = work.path
                    return work.make(lambda: verb(*bound.args, **bound.kwargs), sends=sends)
                if added_to:
                    added = _added_to(added_to, copies, must_add=must_add)
                    given[adds_to] = stack.enter_context(added)
                result = verb(*bound.args, **bound.kwargs)
            return moved_to_copy(result, given[adds_to], added_to) if added_to else result

        return call

    return decorate


def _refuse_place(what: str, url: str, read: Mapping[str, Copy]) -> None:
    """Refuse to make something where something is read, and a bucket without a name in it."""
    if url in read:
        raise ConfigError(
            what, expected="another place than what is read", found=url, hint="Choose another name"
        )
    store, _, name = url.partition("://")
    if store in WHOLE_PUTS and "/" not in name:
        raise ConfigError(
            what, expected="a name in the bucket", found=url, hint=f"Choose one: {url}/NAME"
        )


def _find_urls(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_find_urls, value))
    return _url(value) is not None


def _url(value: object) -> str | None:
    url = url_of(value) if isinstance(value, str | os.PathLike) else None
    return None if url is None else url.rstrip("/")


def _fetch_each(value: Any, copies: dict[str, Copy]) -> Any:
    """Return an argument with local copies in place of URLs."""
    if isinstance(value, list | tuple):
        return [_fetch_each(each, copies) for each in value]
    url = _url(value)
    if url is None:
        return value
    copies[url] = _require(url)
    return copies[url].path


def _require(url: str) -> Copy:
    copy = fetch(url)
    if copy is None:
        raise DataError(
            "URL", expected="a cache or a run", found="nothing", where=url,
            hint="Check the name and what is in the store",
        )  # fmt: skip
    return copy


# ------------------------------------------------------------------------------- adding to a folder


@contextlib.contextmanager
def _added_to(url: str, copies: dict[str, Copy], *, must_add: bool) -> Iterator[Path]:
    """Give a copy of a cache or run; send the files in it that are new or other ones at the end."""
    copy = copies[url] = _require(url)
    with _own_folder(place_of(url, "added").parent) as folder:
        path = folder / copy.path.name
        COPIES[str(path)] = url
        before = link(copy, path)
        yield path
        del COPIES[str(path)]
        try:
            _send_changed(url, path, before, copy.tags)
        except (FeatcacheError, ObjectChangedError) as error:
            failed = error if isinstance(error, FeatcacheError) else _changed(url)
            if must_add:
                raise failed from error
            warn_user(f"not kept in {printable(url)}: {failed}")


@contextlib.contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """Make a new folder in another for this command alone; remove those that killed ones left."""
    make_place(parent)
    for left in parent.iterdir():
        with contextlib.suppress(CacheError), writer_lock(left / LOCK_NAME, left.name):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with writer_lock(folder / LOCK_NAME, folder.name):
            yield folder
    with contextlib.suppress(OSError):
        parent.rmdir()


def _changed(url: str) -> CacheError:
    return CacheError(
        "URL", expected="what was there when the command began", where=url,
        found="something that was written in the meantime", hint="Run the same command again",
    )  # fmt: skip


def _send_changed(
    url: str, path: Path, before: Mapping[str, Stamp], tags: Mapping[str, str]
) -> None:
    changed = [below for below, stamp in files_of(path).items() if before.get(below) != stamp]
    if not changed:
        return
    now, sent = find_objects(url), dict[str, str]()
    for below in {"", *WHOLE} & tags.keys():  # figures of one run are none of another's
        if below not in now or now[below].tag != tags[below]:
            raise ObjectChangedError
    with sending(path, changed) as moved:
        for below in changed:
            sent[below] = send_file(url, path, below, tags.get(below), moved)
    become_copy(url, path, sent)
