"""The verdict of an audit: a small JSON file beside a cache, tied to its content.

Reads and writes: ``CACHE.audit.json``.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of
from featcache.errors import ConfigError, FeatcacheError, printable, warn_user
from featcache.files import follow_link, json_sha256, optional_json_object, readable_json
from featcache.formatting import count
from featcache.outputs import Kind, Output, write_output
from featcache.renames import beside
from featcache.runtime import Say

FORMAT, FORMAT_VERSION = "featcache-audit", 1
_MAX_BYTES = 1 << 20


def verdict_path(cache: Path) -> Path:
    """Return where the verdict on a cache lies: beside the file itself, not beside a link to it."""
    return beside(follow_link(cache.absolute(), "CACHE"), ".audit.json")


def _read(path: Path) -> dict[str, Any]:
    """Return the file as a JSON object, empty if it is no verdict."""
    facts = optional_json_object(path, max_bytes=_MAX_BYTES)
    return facts if facts.get("format") == FORMAT else {}


def _is_own(path: Path) -> bool:
    return bool(_read(path))


_VERDICT = Kind(
    "verdict of featcache audit", "a new file, or an older verdict", ConfigError, _is_own,
    needs_folder=True, may_be_link=False,
)  # fmt: skip


def read_verdict(cache: Cache) -> dict[str, Any] | None:
    """Return the verdict of the last audit of a cache of this content, None if there was none.

    Returns:
        ``parts`` that were looked at, ``num_images`` that were read, ``num_leaks`` (sets of copies
        across splits or of two classes), ``verdict``, a paragraph for people, ``findings``, the
        same for people who run no commands (``text`` and ``is_warning`` each; none in a file of an
        earlier version), and ``version`` of featcache. A file that was edited, or written by a
        newer version in another format, counts as none.
    """
    facts = _read(verdict_path(cache.path))
    keys: dict[str, type] = {
        "parts": list, "num_images": int, "num_leaks": int, "verdict": str, "version": str
    }  # fmt: skip
    if (
        facts.get("format_version") != FORMAT_VERSION
        or facts.get("content_sha256") != cache.content_sha256
        or facts.get("sha256") != json_sha256(facts, without="sha256")
        or any(type(facts.get(key)) is not kind for key, kind in keys.items())
    ):
        return None
    findings = facts.get("findings", [])
    if not isinstance(findings, list) or not all(map(_is_finding, findings)):
        return None
    return {key: facts[key] for key in keys} | {"findings": findings}


def _is_finding(value: object) -> bool:
    return (
        isinstance(value, dict) and type(value.get("text")) is str
        and type(value.get("is_warning")) is bool
    )  # fmt: skip


def write_verdict(
    cache: Cache, *, parts: tuple[str, ...], num_images: int, num_leaks: int, verdict: str,
    findings: list[dict[str, Any]], say: Say,
) -> None:  # fmt: skip
    """Write the verdict beside a cache; where that cannot be done, warn in one line.

    The audit itself is then none the worse. Something else that has the name is left alone. So is
    the verdict on the same content of an audit that read more images, or as many and looked at more
    parts; a line says so.

    Args:
        cache: The cache.
        parts: What was looked at.
        num_images: How many images were read.
        num_leaks: Sets of copies across splits or of two classes.
        verdict: A paragraph for people.
        findings: The verdict for people who run no commands: ``text`` and ``is_warning`` each.
        say: Receives the line.
    """
    earlier = read_verdict(cache)
    if earlier and (earlier["num_images"], len(earlier["parts"])) > (num_images, len(parts)):
        images = count(earlier["num_images"], "image")
        say(f"an earlier audit's verdict stays: {', '.join(earlier['parts'])}; {images} read")
        return
    facts = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "version": __version__,
        "fingerprint": cache.fingerprint, "content_sha256": cache.content_sha256,
        "parts": list(parts), "num_images": num_images, "num_leaks": num_leaks, "verdict": verdict,
        "findings": findings,
    }  # fmt: skip
    text = readable_json(facts | {"sha256": json_sha256(facts, without="sha256")})
    path = verdict_path(cache.path)
    try:
        write_output(Output(path, "verdict", _VERDICT), text.encode())
    except (FeatcacheError, OSError) as error:
        found = error.found if isinstance(error, FeatcacheError) else error.strerror
        warn_user(printable(f"the verdict is not kept in {path.name}: {found}"))


def say_verdict(cache: Cache, say: Say) -> None:
    """Say in one line that a cache was never audited or leaks; else say nothing.

    Caches side by side have the same images: the worst that was found of one of them holds for all.
    """
    verdicts = [verdict for each in caches_of(cache) if (verdict := read_verdict(each))]
    found = max(verdicts, key=lambda verdict: int(verdict["num_leaks"]), default=None)
    if found is None:
        name = shlex.quote(printable(cache.path.as_posix()))
        say(f"this cache was never audited: featcache audit {name}")
    elif found["num_leaks"]:
        sets = count(found["num_leaks"], "set")
        say(f"the audit found leaks: {sets} of copies across splits or of two classes")
