"""Caches of the same images side by side: their rows are matched, their features concatenated.

A row of the first cache is matched in each other cache by split and path, where the hashes of the
image files must be equal if both are known. A path that the other cache lacks is matched by the
hash alone, if one row of the split has it in either cache. Classes, splits, targets, groups and
numbers of views must agree. Features stay in their files, and are scaled by nothing.

Reads: caches. Writes: nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.joined import JoinedCache, JoinedSplit
from featcache.cache.reading import Cache, open_cache
from featcache.errors import CacheError, ConfigError
from featcache.files import local_path
from featcache.formatting import join_few

Caches: TypeAlias = str | Path | Sequence[str | Path]
"""A cache, several of the same images, or a folder of them."""

_Numbers: TypeAlias = npt.NDArray[np.int64]
_SAME = "Extract both from the same images, or take the rows that both have: select --table"


def caches_of(cache: Cache) -> tuple[Cache, ...]:
    """Return the caches that stand side by side in a cache: of one file, itself alone."""
    return cache.caches if isinstance(cache, JoinedCache) else (cache,)


def list_caches(caches: Caches) -> list[Path]:
    """Return the files of one or more caches; of a folder all its ``.h5`` files, by name.

    Raises:
        ConfigError: If there are none.
        FeatcacheError: If one is a URL.
    """
    given = [caches] if isinstance(caches, str | os.PathLike) else [*caches]
    if not given:
        raise ConfigError("CACHE", expected="one or more", found="none")
    paths = list[Path]()
    for path in (local_path(name, "CACHE") for name in given):
        inside = sorted(path.glob("*.h5")) if path.is_dir() else []
        paths += inside or [path]
    return paths


def open_caches(caches: Caches) -> Cache:
    """Open one cache, or several side by side, after checking their files.

    Raises:
        ConfigError: If there is none.
        CacheError: If one is damaged, or they do not fit together: see ``join_caches``.
    """
    return join_caches([open_cache(path) for path in list_caches(caches)])


def join_caches(caches: Sequence[Cache]) -> Cache:
    """Return caches of the same images as one; one cache alone as it is.

    Raises:
        CacheError: If two have the same identity, or the rows of one differ from the first's: in
            image, split, class, target, group or number of views. It names the first such row.
    """
    first, *others = caches
    if not others:
        return first
    _refuse_twice(caches)
    for other in others:
        _check_classes(first, other)
    matched = [_match_rows(first, other) for other in others]
    splits = dict[str, CacheSplit]()
    for name in first.splits:
        rows = [None, *(of_other[name] for of_other in matched)]
        splits[name] = JoinedSplit(name, [cache.splits[name] for cache in caches], rows)
    failures = {(f.split, f.path): f for cache in reversed(caches) for f in cache.failures}
    identity = {
        "backbone": " + ".join(str(cache.identity.get("backbone")) for cache in caches),
        "augmentation": first.identity.get("augmentation"),
        "side_by_side": [cache.identity for cache in caches],
    }
    return JoinedCache(
        path=first.path, identity=identity, provenance=first.provenance, classes=first.classes,
        task=first.task, splits=splits, failures=tuple(failures.values()),
        container=first.container, caches=tuple(caches),
    )  # fmt: skip


def _refuse_twice(caches: Sequence[Cache]) -> None:
    seen: dict[str, Cache] = {}
    for cache in caches:
        twin = seen.setdefault(cache.fingerprint, cache)
        if twin is not cache:
            raise CacheError(
                "caches side by side", expected="each of another backbone or preprocessing",
                found=f"the same identity as {twin.path}", where=cache.path,
                hint="Name each once; features made elsewhere get an identity by write_cache",
            )  # fmt: skip


def _check_classes(first: Cache, other: Cache) -> None:
    """Refuse another task, other classes or other splits."""
    classes = [join_few(cache.classes) for cache in (first, other)]
    if first.classes != other.classes and classes[0] == classes[1]:  # they differ further on
        pairs = zip_longest(first.classes, other.classes, fillvalue="no more")
        classes = list(next(pair for pair in pairs if pair[0] != pair[1]))
    for what, expected, found in (
        ("task", first.task, other.task),
        ("classes", *classes),
        ("splits", ", ".join(first.splits), ", ".join(other.splits)),
    ):
        if expected != found:
            raise _differing(what, f"{expected}, as in {first.path.name}", found, other)


def _match_rows(first: Cache, other: Cache) -> dict[str, _Numbers | None]:
    """Return, by split, the other cache's row for each of the first's; None for equal order."""
    matched = dict[str, _Numbers | None]()
    for name, split in first.splits.items():
        theirs = other.splits[name]
        rows = _find_rows(first, other, name)
        _check_rows(first, other, name, rows)
        if split.num_views != theirs.num_views:
            raise _differing(
                f"views of split {name}", f"{split.num_views} of each row, as in {first.path.name}",
                theirs.num_views, other, "Extract with the same --views and --augment",
            )  # fmt: skip
        augmentations = [cache.identity.get("augmentation") for cache in (first, other)]
        if split.num_views > 1 and augmentations[0] != augmentations[1]:
            raise _differing(
                f"views of split {name}", f"{augmentations[0]}, as in {first.path.name}",
                augmentations[1], other, "Extract with the same --views and --augment",
            )  # fmt: skip
        matched[name] = None if np.array_equal(rows, np.arange(len(theirs))) else rows
    return matched


def _find_rows(first: Cache, other: Cache, name: str) -> _Numbers:
    """Return the number of the row of the same image in the other cache, for each row of a split.

    Raises:
        CacheError: If an image is not in both.
    """
    ours, theirs = first.splits[name], other.splits[name]
    if ours.paths == theirs.paths:
        return np.arange(len(ours))
    places = {path: number for number, path in enumerate(theirs.paths)}
    rows = np.array([places.get(path, -1) for path in ours.paths], np.int64)
    if (rows < 0).any():
        hashes, other_hashes = (
            [row.tobytes() for row in split.image_sha256] for split in (ours, theirs)
        )
        counts, numbers = Counter(hashes), {digest: n for n, digest in enumerate(other_hashes)}
        other_counts = Counter(other_hashes)
        for number in np.flatnonzero(rows < 0).tolist():
            digest = hashes[number]
            if any(digest) and counts[digest] == other_counts[digest] == 1:
                rows[number] = numbers[digest]
            else:
                raise _missing(first, other, name, number)
    _, times = np.unique(rows, return_counts=True)
    if len(times) < len(rows):
        raise _differing(f"paths of split {name}", "each once", "one twice", other)
    if len(rows) < len(theirs):
        number = int(np.setdiff1d(np.arange(len(theirs)), rows)[0])
        raise _missing(other, first, name, number)
    return rows


def _missing(having: Cache, lacking: Cache, name: str, number: int) -> CacheError:
    """Return the error for an image that one cache has in a split and the other has not."""
    split = having.splits[name]
    path, digest = split.paths[number], split.image_sha256[number]
    found = f"only in {having.path.name}"
    for elsewhere, theirs in lacking.splits.items():
        same = (theirs.image_sha256 == digest).all(axis=1) & digest.any()
        if path in theirs.paths or same.any():
            found = f"it in split {elsewhere}"
            if elsewhere == name:
                found = f"several copies of it in split {name}, under other names"
    for failure in lacking.failures:
        if (failure.split, failure.path) == (name, path):
            found = f"it failed there: {failure.reason}"
    return _differing(f"split {name}, {path}", "the same image in each cache", found, lacking)


def _check_rows(first: Cache, other: Cache, name: str, rows: _Numbers) -> None:
    """Refuse matched rows of other images, targets or groups, naming the first that differs."""
    ours, theirs = first.splits[name], other.splits[name]

    def refuse(what: str, number: int, expected: object, found: object) -> CacheError:
        path = ours.paths[number]
        return _differing(
            f"split {name}, {what} of {path}", f"{expected}, as in {first.path.name}", found, other
        )

    hashes, other_hashes = ours.image_sha256, theirs.image_sha256[rows]
    are_known = hashes.any(axis=1) & other_hashes.any(axis=1)
    if (differing := are_known & (hashes != other_hashes).any(axis=1)).any():
        number = int(differing.argmax())
        digests = [row[number].tobytes().hex()[:16] for row in (hashes, other_hashes)]
        raise refuse("image", number, f"sha256 {digests[0]}...", f"{digests[1]}...")
    targets, other_targets = ours.targets, theirs.targets[rows]
    equal = (targets == other_targets) | (np.isnan(targets) & np.isnan(other_targets))
    equal = equal.reshape(len(rows), -1).all(axis=1)
    if not equal.all():
        number = int(equal.argmin())
        pair = (_describe(first, side[number]) for side in (targets, other_targets))
        raise refuse("target", number, *pair)
    groups, other_groups = ours.groups, theirs.groups
    if (groups is None) != (other_groups is None):
        expected, found = ("none" if side is None else "some" for side in (groups, other_groups))
        raise _differing(
            f"groups of split {name}", f"{expected}, as in {first.path.name}", found, other,
            "Extract both with the same --group-by",
        )  # fmt: skip
    for number, row in enumerate(rows.tolist() if groups and other_groups else ()):
        assert groups is not None
        assert other_groups is not None
        if groups[number] != other_groups[row]:
            raise refuse("group", number, groups[number] or "none", other_groups[row] or "none")


def _describe(cache: Cache, target: Any) -> str:
    """Return a target in words: class names."""
    if np.ndim(target) == 0:
        return cache.classes[target] if target >= 0 else "unlabelled"
    pairs = zip(cache.classes, target.tolist(), strict=True)
    return ", ".join(f"{name} {'unknown' if np.isnan(v) else int(v)}" for name, v in pairs)


def _differing(
    what: str, expected: object, found: object, other: Cache, hint: str = _SAME
) -> CacheError:
    return CacheError(
        f"caches side by side, {what}", expected=expected, found=found, where=other.path, hint=hint
    )
