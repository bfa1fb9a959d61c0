"""Name the groups of rows of caches by a pattern, and split rows anew, as ``split`` does images.

Reads: hashes of images in open caches. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featcache.cache.merging import Row, gather
from featcache.cache.rearrangement import Rearrangement
from featcache.data.dataset import UNLABELLED
from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.data.groups import GroupPattern
from featcache.data.splitting import TOO_FEW
from featcache.data.stratification import assign_labelled_units, assign_units, build_units
from featcache.errors import DataError


def name_groups(chosen: Rearrangement, pattern: GroupPattern) -> None:
    """Set the groups of all rows by a pattern; if it matches none, they stay as they are.

    Paths are searched as the caches have them, below the class that a row has in its cache.
    """
    rows, failed = chosen.rows, chosen.failed
    paths, classes, prefixes = [], [], []
    for row in (*rows, *failed):
        prefix, cache = chosen.prefixes[row.cache], chosen.caches[row.cache]
        paths.append(row.path.removeprefix(prefix))
        prefixes.append(prefix)
        old = cache.splits[row.source].targets if row.source else None
        target = cache.failures[row.number].target if old is None else old[row.number]
        has_class = not chosen.is_multilabel and target != UNLABELLED
        classes.append(cache.classes[target] if has_class else "")
    groups = [
        None if group is None else prefix + group
        for prefix, group in zip(prefixes, pattern.find(paths, classes), strict=True)
    ]
    of_rows, of_failed = groups[: len(rows)], groups[len(rows) :]
    named = [group or row.path for group, row in zip(of_rows, rows, strict=True)]
    labels = [row.label or "unlabelled" for row in rows]
    pattern.count_matches(of_rows, labels, len({*named}), chosen.say)
    if any(of_rows):
        chosen.rows = [r._replace(group=g) for r, g in zip(rows, named, strict=True)]
        chosen.failed = [r._replace(group=g) for r, g in zip(failed, of_failed, strict=True)]


def join_splits(chosen: Rearrangement) -> None:
    """Put all rows into split ``all``: which split they came from matters no more."""
    chosen.rows = [row._replace(split="all") for row in chosen.rows]


def split_anew(chosen: Rearrangement, fractions: Mapping[str, float], seed: int) -> None:
    """Set the split of all rows, once they are settled, as ``split`` would that of their images.

    Rows of a group and rows of the same bytes stay together. A failed image goes with its group; of
    no known group, with the first split.

    Args:
        chosen: The rows.
        fractions: Split -> its share of every class.
        seed: Seed of the split.

    Raises:
        DataError: If a class has too few groups to reach every split.
    """
    rows = chosen.rows
    hashes = gather(chosen.caches, rows, lambda _, split, n: split.image_sha256[n])
    contents = [image.tobytes() if image.any() else None for image in hashes]
    units, names = build_units([row.group for row in rows], contents), _names_of(rows)
    try:
        if chosen.is_multilabel:
            is_positive = chosen.targets(rows) == 1
            parts = assign_labelled_units(units, is_positive, names, fractions, seed=seed)
        else:
            labels = [row.label or "unlabelled" for row in rows]
            parts = assign_units(units, labels, names, fractions, seed=seed)
    except DataError as error:
        raise DataError(
            error.what, expected=error.expected, found=error.found, where=chosen.caches[0].path,
            hint=TOO_FEW,
        ) from error  # fmt: skip
    chosen.rows = [row._replace(split=part) for row, part in zip(rows, parts, strict=True)]
    chosen.sort_rows()
    part_of = {row.group: row.split for row in chosen.rows if row.group}
    first = next(iter(fractions))
    chosen.failed = [
        row._replace(split=part_of.get(row.group or "", first)) for row in chosen.failed
    ]


def _names_of(rows: Sequence[Row]) -> list[str]:
    """Return the rows' paths without the folder of their old split, if they differ without it.

    So a tree that was split is split anew as the folder it was made of would be.
    """
    names = []
    for row in rows:
        first, _, rest = row.path.partition("/")
        names.append(rest if first.casefold() in SPLIT_OF_FOLDER and rest else row.path)
    return names if len(set(names)) == len(names) else [row.path for row in rows]
