"""The error tree. Every foreseeable failure of featcache is one of these, in one line.

FeatcacheError
├── DataError        the input: folders, CSV, zip, images
│   └── TransientError   one image failed, but may not fail again: no memory, a dead decoder
├── BackboneError    a backbone's name, weights or output
├── CacheError       a cache file that is not whole, not ours, or does not fit
├── RunError         a run folder that is not whole, or does not fit
└── ConfigError      an invalid option, or options that contradict each other

FeatcacheWarning     something the user should know that does not stop the work
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
import warnings
from pathlib import Path, PurePath
from typing import Any

_UNSAFE_CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}


_SHOWN_START, _SHOWN_END = 300, 100


def printable(value: object) -> str:
    """Return a name or a value as text for people: escaped, and of 403 characters at most.

    Of a longer text the middle is left out: a class of 200,000 letters made ``predict`` print 80 MB
    for 400 images.
    """
    text = name_urls(_as_text(value))
    if len(text) > _SHOWN_START + 3 + _SHOWN_END:
        text = f"{text[:_SHOWN_START]}...{text[-_SHOWN_END:]}"
    return escaped(text)


def _as_text(value: object) -> str:
    """Return a value as text; a ``Path`` made of a URL, which has lost a slash, as that URL."""
    if isinstance(value, PurePath):
        return re.sub(r"\A([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])", r"\1://", str(value))
    return str(value)


def escaped(text: str) -> str:
    """Return a whole text that is safe to print on a terminal or to write into a log.

    Control characters, direction overrides and undecodable bytes become visible escapes: file
    and class names are not trusted, and may contain terminal commands.
    """
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode("ascii")
        if unicodedata.category(char) in _UNSAFE_CATEGORIES
        else char
        for char in text
    )


COPIES: dict[str, str] = {}
"""Local copy of a cache or run -> the URL of which it is one: see ``cache.remote_copies``."""

_UNFINISHED = r"(?!\.partial|\.sweep)"  # lies here alone


def name_urls(text: str) -> str:
    """Return a text in which local copies are called by the URLs that the user knows them by."""
    for path, url in COPIES.items() if COPIES else ():
        if path in text:
            text = url.join(re.split(re.escape(path) + _UNFINISHED, text))
    return without_secrets(text) if "://" in text else text


def without_secrets(text: str) -> str:
    """Return a text whose URLs are without passwords and, of web servers, signed queries."""
    text = re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", text)
    return re.sub(r"(?i)(https?://[^\s?\"]*)\?[^\s)\"]*[&?=][^\s)\"]*", r"\1?...", text)


class FeatcacheError(Exception):
    """Base class of all errors that featcache raises on purpose.

    The message is always ``<what>: expected X, found Y (<file or key>). <what to do next>.``
    Each part is shortened as ``printable`` does it.

    Args:
        what: What is wrong, in a few words.
        expected: What would have been right.
        found: What was found instead.
        where: The file, folder or key, if there is one.
        hint: What to do next, a sentence without its full stop.
    """

    __module__ = "featcache"

    def __init__(
        self, what: str, *, expected: object, found: object, where: object = None, hint: str = ""
    ) -> None:
        self.what, self.expected, self.found = what, expected, found
        self.where, self.hint = where, hint
        what, wanted, seen = map(printable, (what, expected, found))
        place = "" if where is None else f" ({printable(where)})"
        advice = f" {escaped(hint.rstrip('.'))}." if hint else ""
        super().__init__(f"{what}: expected {wanted}, found {seen}{place}.{advice}")

    def __reduce__(self) -> tuple[object, ...]:
        """Support pickling: a child process that decodes images sends its errors back."""
        where = _as_text(self.where) if isinstance(self.where, PurePath) else self.where
        details: dict[str, Any] = {
            "expected": self.expected, "found": self.found, "where": where, "hint": self.hint,
        }  # fmt: skip
        return functools.partial(type(self), **details), (self.what,)


class DataError(FeatcacheError):
    """The given images, folders, CSV or zip cannot be used as they are."""

    __module__ = "featcache"


class TransientError(DataError):
    """An image could not be read this time; the same bytes may be readable next time."""


class BackboneError(FeatcacheError):
    """A backbone cannot be built, its weights do not fit, or its output is wrong."""

    __module__ = "featcache"


class CacheError(FeatcacheError):
    """A cache file is damaged, was not made by featcache, or does not fit the request."""

    __module__ = "featcache"


class RunError(FeatcacheError):
    """A run folder is damaged or incomplete, or does not fit the request."""

    __module__ = "featcache"


class ConfigError(FeatcacheError):
    """An option is invalid, or options contradict each other."""

    __module__ = "featcache"


class FeatcacheWarning(UserWarning):
    """Something the user should know that does not stop the work."""

    __module__ = "featcache"


_PACKAGE = str(Path(__file__).parent / "_")[:-1]  # with the separator: featcache2 is another


def warn_user(message: str) -> None:
    """Issue a ``FeatcacheWarning`` at the line outside this package that called into it."""
    level = 1
    while sys._getframe(level).f_code.co_filename.startswith(_PACKAGE):
        level += 1
    warnings.warn(message, FeatcacheWarning, stacklevel=level + 1)
