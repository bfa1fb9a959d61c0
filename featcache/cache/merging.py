"""Join the rows of several caches into one list; the same image under the same path is one row.

Reads: open caches, and the features of rows that are merged. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.precisions import error_bounds
from featcache.cache.reading import Cache
from featcache.data.dataset import UNLABELLED
from featcache.errors import CacheError
from featcache.precision import relative_errors

_Integers = npt.NDArray[np.int64]


class Row(NamedTuple):
    """A row (or a failed image) of a cache, and its place in the new one.

    Attributes:
        cache: Index of the cache it comes from.
        source: Its split there; "" for a failed image.
        number: Its row number there.
        path: Path in the new cache, as are split, label and group.
        split: ``train``, ``valid``, ``test`` or ``all``.
        label: Class name; None for unlabelled, and in ``multilabel`` caches.
        group: None if it has none.
    """

    cache: int
    source: str
    number: int
    path: str
    split: str
    label: str | None
    group: str | None


def gather(
    caches: Sequence[Cache], rows: Sequence[Row],
    take: Callable[[int, CacheSplit, _Integers], npt.NDArray[Any]],
) -> npt.NDArray[Any]:  # fmt: skip
    """Return what ``take`` gives for the rows, in their order.

    Args:
        caches: The caches.
        rows: At least one row.
        take: Called with the index of a cache, one of its splits and n row numbers; returns an
            array (n, ...), with the same dtype and shape (but for n) for all.
    """
    numbers = np.array([row.number for row in rows])
    places: dict[tuple[int, str], list[int]] = {}
    for position, row in enumerate(rows):
        places.setdefault((row.cache, row.source), []).append(position)
    parts = [take(c, caches[c].splits[name], numbers[at]) for (c, name), at in places.items()]
    gathered = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
    for positions, part in zip(places.values(), parts, strict=True):
        gathered[positions] = part
    return gathered


def collect_rows(caches: Sequence[Cache], prefixes: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Return all rows and all failed images of some caches, unchanged.

    Args:
        caches: The caches.
        prefixes: Prefix of each cache's paths and groups; may be "".
    """
    rows: list[Row] = []
    failed: list[Row] = []
    for c, (cache, prefix) in enumerate(zip(caches, prefixes, strict=True)):
        labels: list[str | None] = [*cache.classes, None]  # -1 is the last
        for name, split in cache.splits.items():
            multiclass = cache.task == "multiclass"
            targets = split.targets.tolist() if multiclass else [UNLABELLED] * len(split)
            groups = split.groups if split.groups is not None else [None] * len(split)
            for number, (path, target, group) in enumerate(
                zip(split.paths, targets, groups, strict=True)
            ):
                whole = group if group is None else prefix + group
                rows.append(Row(c, name, number, prefix + path, name, labels[target], whole))
        for number, failure in enumerate(cache.failures):
            label = labels[failure.target]
            failed.append(Row(c, "", number, prefix + failure.path, failure.split, label, None))
    return rows, failed


def merge_same_images(
    caches: Sequence[Cache], rows: Iterable[Row],
    have_equal_labels: Callable[[Row, Row], bool],
) -> tuple[list[Row], list[tuple[Row, Row]]]:  # fmt: skip
    """Merge rows of the same image and path; refuse different images of the same path.

    The row with the most views is kept, on ties that of the first cache, with the known group.

    Returns:
        The rows, and the pairs of rows that were merged.

    Raises:
        CacheError: If two images have one path, or an image has two classes, splits or groups.
    """
    kept: dict[str, list[Row]] = {}
    pairs = []
    for row in rows:
        others = kept.setdefault(row.path, [])
        twin = next((o for o in others if o.split == row.split), None)
        # The same path may be in two splits of one cache: keep both.
        twin = twin or next((o for o in others if o.cache != row.cache), None)
        if twin is None:
            others.append(row)
            continue
        _require_same_image(caches, twin, row, have_equal_labels)
        group = row.group if twin.group is None else twin.group
        best = max(twin, row, key=lambda r: caches[r.cache].splits[r.source].num_views)
        others[others.index(twin)] = best._replace(group=group)
        pairs.append((twin, row))
    return [row for others in kept.values() for row in others], pairs


def _require_same_image(
    caches: Sequence[Cache], a: Row, b: Row, have_equal_labels: Callable[[Row, Row], bool]
) -> None:
    def wrong(expected: str, found_a: object, found_b: object, hint: str) -> CacheError:
        places = [f"{caches[r.cache].path.as_posix()}, {r.source}" for r in (a, b)]
        return CacheError(
            f"path {a.path}", expected=expected,
            found=f"{found_a} in {places[0]} and {found_b} in {places[1]}", hint=hint,
        )  # fmt: skip

    hashes = [caches[r.cache].splits[r.source].image_sha256[r.number] for r in (a, b)]
    if not hashes[0].any() or (hashes[0] != hashes[1]).any():
        known = [f"sha256 {h.tobytes().hex()[:8]}..." if h.any() else "one" for h in hashes]
        raise wrong(
            "one image",
            known[0],
            known[1],
            "Tell the caches' images apart with --prefix, or leave rows out",
        )
    if not have_equal_labels(a, b):
        labels = [str(r.label or "unlabelled or of other labels") for r in (a, b)]
        raise wrong("one class", labels[0], labels[1], "Say which in a --table of path,target")
    if a.split != b.split:
        raise wrong("one split", a.split, b.split, "Say which in a --table of path,split")
    if None not in {a.group, b.group} and a.group != b.group:
        raise wrong("one group", a.group, b.group, "Say which in a --table of path,group")


def check_pairs(caches: Sequence[Cache], pairs: Sequence[tuple[Row, Row]]) -> None:
    """Refuse caches with different features of one image: one of them is wrong.

    Raises:
        CacheError: If the difference is larger than the sum of both bounds.
    """
    of_rows = [error_bounds(cache) for cache in caches] if pairs else []
    for i in range(0, len(pairs), 1024):
        part = pairs[i : i + 1024]
        a, b = (
            gather(caches, rows, lambda _, split, n: split.read_rows(n).astype(np.float32))
            for rows in zip(*part, strict=True)
        )
        for (x, y), error in zip(part, relative_errors(a, b), strict=True):
            if error > sum(of_rows[row.cache][row.source][row.number] for row in (x, y)):
                raise CacheError(
                    f"features of {x.path}", where=caches[y.cache].path,
                    expected=f"those of {caches[x.cache].path.as_posix()}, the same image",
                    found=f"others, by {error:.1e}",
                    hint="Find the wrong cache with featcache verify CACHE --data DATA",
                )  # fmt: skip
