"""Verify: is this cache whole, and are its features those of the images?

Reads: caches, images. Writes: nothing, or a cache again without its bad rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.cache.by_url import by_url
from featcache.cache.container import ArrayReader, content_sha256, open_container
from featcache.cache.hdf5 import compare_with_hdf5
from featcache.cache.integrity import METADATA, BadRow, Damage, find_damage, find_infinite
from featcache.cache.reading import Cache, is_content, open_cache, read_cache
from featcache.cache.repair import find_bad_rows, write_without
from featcache.cache.writing import CACHE, cache_lock, partial_folder
from featcache.data.sources import Data
from featcache.errors import CacheError, printable
from featcache.extraction.manifest import read_manifest
from featcache.extraction.shards import is_whole
from featcache.files import (
    disk_error,
    follow_link,
    local_path,
    result_as_dict,
    set_mode,
    sync_folder,
)
from featcache.formatting import brief_repr, count
from featcache.outputs import Output
from featcache.runtime import Say, log_line
from featcache.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone
    from featcache.extraction.comparison import Comparison

_REBUILD = "Extract it again: featcache extract DATA CACHE --rebuild"
_REPAIR = "Rewrite it with featcache verify CACHE --repair"
_DROP = "Drop bad rows with featcache verify {path}{data} --repair, then extract what is missing"
_UNDAMAGED = Damage((), (), ())


@dataclass(frozen=True)
class Verification:
    """What was checked, all of it good: anything bad is an error, or was dropped.

    Attributes:
        cache: The file.
        num_rows: Rows of all splits.
        payload_sha256: As recorded and as found.
        content_sha256: As recorded and as found.
        num_compared: Rows whose features were recomputed from their images.
        largest_error: Their largest relative L2 error, None without ``data``.
        bound: What it had to stay under, None without ``data``.
        changed: Paths whose image is another one now; with ``repair`` only, their rows are dropped.
        vanished: Paths whose image is gone.
        appeared: Paths of images that the cache does not know.
        relabelled: Paths of images of another class than the cache says.
        repaired: Whether the file was written again.
        dropped: Paths of the rows that were dropped, as they were found.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    cache: Path
    num_rows: int
    payload_sha256: str
    content_sha256: str
    num_compared: int = 0
    largest_error: float | None = None
    bound: float | None = None
    changed: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    appeared: tuple[str, ...] = ()
    relabelled: tuple[str, ...] = ()
    repaired: bool = False
    dropped: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the verification as JSON values."""
        return result_as_dict(self)


@by_url(adds_to="cache")
def verify(
    cache: str | Path,
    *,
    data: Data | None = None,
    samples: int | str = 32,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    group_salt: str | Path | None = None,
    repair: bool = False,
    say: Say = log_line,
) -> Verification:
    """Check that a cache is whole, and with ``data`` that its features are those of the images.

    Whole: lengths, checksums, the table against libhdf5's view (in a child process), finite
    features, sorted paths. True: features of a seeded sample, with all its views, are recomputed
    from the images by the plain network in fp32, and stay within the precision's bound of the
    cached ones; the images are those the rows were made of.

    Args:
        cache: The file.
        data: The images it was made of.
        samples: Rows to recompute, or ``all``.
        weights: The weights file it was made with, where the library's own were not used.
        backbone: The backbone itself, if it was made in Python; its name, if a ``python:`` function
            makes it.
        device: Where to recompute.
        max_pixels: As it was given to ``extract``.
        group_salt: The salt of hashed paths, where it does not lie beside the cache.
        repair: Write the file again without the rows that are damaged, not finite or, of those
            compared with ``data``, of another image or not true. They are listed among the
            failures, and the next extraction makes them again. A row that cannot be vouched for is
            never kept, and the old file stays if anything goes wrong.
        say: Where lines for people go.

    Raises:
        CacheError: At the first row or part that is not right, naming it and the repair; with
            ``repair``, if there is nothing left to build on.
        BackboneError: If the backbone cannot be built.
    """
    path = local_path(cache, "CACHE")
    _refuse_unfinished(path)
    how = {
        "samples": samples, "weights": weights, "backbone": backbone, "device": device,
        "max_pixels": max_pixels, "group_salt": group_salt,
    }  # fmt: skip
    if repair:
        return _repair(path, data, how, say)
    container = open_container(path, verify=False)
    _refuse_damaged(path, find_damage(container))
    say(f"payload sha256 {container.payload_sha256}: as recorded")
    opened = read_cache(container)
    _check_whole(opened)
    say("table, HDF5 view, content sha256, checksums of rows, finite features, order: good")
    if data is None:
        return _result(opened, None)
    from featcache.extraction.comparison import compare

    comparison = compare(opened, data, say=say, **how)  # type: ignore[arg-type]
    _refuse_rows(path, comparison.bad_rows, f" --data {data} --samples all")
    return _result(opened, comparison)


def _result(cache: Cache, comparison: Comparison | None) -> Verification:
    num_rows = sum(len(split) for split in cache.splits.values())
    result = Verification(cache.path, num_rows, cache.payload_sha256, cache.content_sha256)
    if comparison is None:
        return result
    return replace(
        result, num_compared=comparison.num_compared, largest_error=comparison.largest_error,
        bound=comparison.bound, changed=comparison.changed, vanished=comparison.vanished,
        appeared=comparison.appeared, relabelled=comparison.relabelled,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ whole


def _refuse_unfinished(path: Path) -> None:
    """Say how far an extraction has come whose cache is not there yet."""
    folder = partial_folder(path)
    if path.exists() or not (folder / "manifest.json").is_file():
        return
    try:
        shards = read_manifest(folder / "manifest.json").shards
        num_images = sum(shard.num_rows for shard in shards)
        damaged = [shard.file for shard in shards if not is_whole(folder, shard)]
        kept = f"{count(num_images, 'image')} in {count(len(shards), 'shard')}"
        found = f"an unfinished extraction, {kept}"
    except (OSError, ValueError):
        damaged, found = [], "an unfinished extraction, whose manifest cannot be read"
    hint = "Repeat the extract command it was begun with: it goes on from there"
    if damaged:
        found += f", {len(damaged)} of them damaged: {', '.join(damaged[:5])}"
        hint += ", and makes damaged shards again"
    raise CacheError("cache", expected="a finished file", found=found, where=folder, hint=hint)


def _refuse_damaged(path: Path, damage: Damage) -> None:
    """Raise at the first damaged row, or else part."""
    _refuse_rows(path, damage.rows, "")
    if damage.parts:
        hint = _REPAIR
        if damage.is_meaning_lost or any(part.startswith("splits/") for part in damage.parts):
            hint = f"Copy it again. {_REBUILD}"
        what = "HDF5 metadata" if damage.parts == (METADATA,) else damage.parts[0]
        raise CacheError(
            f"cache, {what}", expected="what was written (payload sha256)", found="damage",
            where=path, hint=hint,
        )  # fmt: skip


def _refuse_rows(path: Path, bad_rows: Sequence[BadRow], data: str) -> None:
    """Raise at the first of some bad rows."""
    if not bad_rows:
        return
    first, others = bad_rows[0], len(bad_rows) - 1
    more = f" ({others:,} other rows are bad too)" if others > 1 else " (as is another row)"
    more = more if others else ""
    raise CacheError(
        f"row {first.row} of {first.split}, {first.path}", expected=first.expected,
        found=f"{first.found}{more}", where=path, hint=_DROP.format(path=path, data=data),
    )  # fmt: skip


def _check_whole(cache: Cache) -> None:
    """Check what its checksums do not: HDF5's view, the content hash, values and order."""
    _check_content(cache)
    _refuse_rows(cache.path, find_infinite(cache.container), "")
    differences = compare_with_hdf5(cache.container)
    if differences:
        raise CacheError(
            "HDF5 view of the cache", expected="what the table says", found=differences[0],
            where=cache.path, hint=_REPAIR,
        )  # fmt: skip


def _check_content(cache: Cache) -> None:
    """Check what no repair can mend in a file that is as it was written."""

    def wrong(what: str, expected: object, found: object) -> CacheError:
        return CacheError(what, expected=expected, found=found, where=cache.path, hint=_REBUILD)

    digests = {
        name: (entry.dtype, entry.shape, _array_sha256(cache, name))
        for name, entry in cache.container.arrays.items()
        if is_content(name)
    }
    if content_sha256(digests) != cache.content_sha256:
        raise wrong("content sha256", cache.content_sha256, content_sha256(digests))
    for name in cache.splits:
        stored = cache.container.read(f"splits/{name}/paths").tolist()
        if stored != sorted(set(stored)):
            raise wrong(f"paths of {name}", "each once, sorted by their bytes", "another order")


def _array_sha256(cache: Cache, name: str) -> str:
    digest = hashlib.sha256()
    for piece in ArrayReader(cache.container, name).pieces():
        digest.update(piece.data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- repair


def _repair(path: Path, data: Data | None, how: dict[str, Any], say: Say) -> Verification:
    """Write the cache again without its bad rows; publish it once it is known to be good."""
    path = follow_link(path)
    with _work_folder(path) as folder:
        # Damaged, it may not look like a cache; what is published over is what was opened.
        output = Output(path, "CACHE", replace(CACHE, is_own=lambda _: True))
        container = open_container(path, verify=False)
        damage = find_damage(container)
        bad_rows = find_bad_rows(container, damage)
        if not damage:
            opened = read_cache(container)
            _check_content(opened)
        if damage or bad_rows or compare_with_hdf5(container):
            opened = write_without(container, bad_rows, damage, folder / "whole")
            _check_repaired(opened)
        comparison = None
        if data is not None:
            from featcache.extraction.comparison import compare

            comparison = compare(opened, data, say=say, **how)
            if comparison.bad_rows:
                opened = write_without(
                    opened.container, comparison.bad_rows, _UNDAMAGED, folder / "true"
                )
                _check_repaired(opened)
                bad_rows = [*bad_rows, *comparison.bad_rows]
        repaired = opened.path != path
        if repaired:
            _publish(opened.path, output)
            opened = open_cache(path, verify=False)
    if not repaired:
        say("nothing to repair")
    _say_repair(damage, bad_rows, say)
    result = _result(opened, comparison)
    return replace(result, repaired=repaired, dropped=tuple(row.path for row in bad_rows))


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """Hold the writer's lock of a cache; yield its folder, and leave nothing of ours in it."""
    folder = partial_folder(path)
    open_container(path, verify=False)  # a file that is none of ours gets no folder beside it
    with cache_lock(path):
        try:
            yield folder
        finally:
            for name in ("whole", "true"):
                (folder / name).unlink(missing_ok=True)
            if [file.name for file in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder, ignore_errors=True)


def _publish(new: Path, output: Output) -> None:
    """Put a repaired cache in the place of the old one."""
    try:
        set_mode(new, stat.S_IMODE(output.target.stat().st_mode))
        output.publish(new)
        sync_folder(output.target.parent)
    except OSError as error:
        raise disk_error(error, output.path, 4096) from error  # a folder's block


def _check_repaired(cache: Cache) -> None:
    """Insist that a repaired cache passes what it will be judged by."""
    _refuse_damaged(cache.path, find_damage(cache.container))
    _check_whole(read_cache(cache.container))


def _say_repair(damage: Damage, bad_rows: Sequence[BadRow], say: Say) -> None:
    for row in bad_rows[:20]:
        say(printable(f"dropped: row {row.row} of {row.split}, {row.path}: found {row.found}"))
    if len(bad_rows) > 20:
        say(f"dropped: and {len(bad_rows) - 20:,} more, see featcache info")
    for part in damage.parts:
        say(f"damaged and written again: {part}")
