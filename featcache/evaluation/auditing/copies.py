"""Copies among the rows of a cache: the same file, or features too alike for two images.

Reads: a cache, no images. Writes: nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.csv_files import csv_text
from featcache.data.stratification import build_units
from featcache.errors import CacheError, ConfigError, printable

COLUMNS = ["path", "group", "copies"]
EXAMPLES = 5
# 60 chest X-rays saved again as JPEG of quality 75 have 0.83 to 0.99 (EfficientNet-Lite0); of the
# 404 different files there, all but one pair (one radiograph twice, 0.94) have at most 0.79.
FLOOR = 0.8
_BLOCK_ROWS = 2048
LEAST_ROWS = 20  # a median and a spread of fewer neighbours say little
_FALSE_ALARMS = 0.05  # expected among all rows, where the null holds
_GUMBEL_MAD = 0.767049  # median absolute deviation of the Gumbel distribution of scale 1
_MAX_PAIRS = 1_000_000
_HIGHEST = 1 - 1e-6  # a cosine of float32 tells no more


@dataclass(frozen=True)
class AuditRows:
    """All rows of a cache, split after split.

    Attributes:
        cache: The cache.
        splits: The split of each row.
        paths: The path of each row.
        groups: The group of each row, None where the cache has none.
        targets: (N,) int64, or (N, C) float32 for multilabel caches.
        images: A number per row that rows of one file share; unknown files have their own.
        has_hash: (N,) bool, whether the image's hash is known.
    """

    cache: Cache
    splits: list[str]
    paths: list[str]
    groups: list[str | None]
    targets: npt.NDArray[Any]
    images: npt.NDArray[np.int64]
    has_hash: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, cache: Cache) -> AuditRows:
        """Read everything but the features."""
        parts = list(cache.splits.values())
        hashes = np.concatenate([part.image_sha256 for part in parts])
        has_hash: npt.NDArray[np.bool_] = np.asarray(hashes.any(axis=1))
        numbers: dict[bytes, int] = {}
        images = [
            numbers.setdefault(row.tobytes(), i) if known else i
            for i, (row, known) in enumerate(zip(hashes, has_hash, strict=True))
        ]
        groups: list[str | None] = []
        for part in parts:
            groups += part.groups or [None] * len(part)
        return cls(
            cache, [part.name for part in parts for _ in range(len(part))],
            [path for part in parts for path in part.paths], groups,
            np.concatenate([part.targets for part in parts]), np.array(images, np.int64), has_hash,
        )  # fmt: skip

    def describe(self, row: int) -> dict[str, Any]:
        """Return split, path, class (None where unlabelled or of several labels) and group."""
        target = None if self.targets.ndim == 2 else int(self.targets[row])
        known = target is not None and target >= 0
        return {
            "split": self.splits[row], "path": self.paths[row],
            "class": self.cache.classes[target] if target is not None and known else None,
            "group": self.groups[row],
        }  # fmt: skip

    def disagree(self, rows: Sequence[int]) -> bool:
        """Whether rows of one image have labels that contradict each other."""
        found = self.targets[list(rows)]
        if found.ndim == 2:
            return bool(((found == 1).any(axis=0) & (found == 0).any(axis=0)).any())
        return len({*found.tolist()} - {-1}) > 1


def summarise_sets(rows: AuditRows, sets: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return how many sets of copies there are, of which kind, with up to five examples each."""
    kinds: dict[str, list[Sequence[int]]] = {
        "across_splits": [s for s in sets if len({rows.splits[row] for row in s}) > 1],
        "label_conflicts": [s for s in sets if rows.disagree(s)],
        "across_groups": [s for s in sets if len({rows.groups[row] for row in s}) > 1],
    }
    facts: dict[str, Any] = {"num_sets": len(sets), "num_rows": sum(map(len, sets))}
    for name, found in kinds.items():
        examples = [[rows.describe(row) for row in s[:EXAMPLES]] for s in found[:EXAMPLES]]
        facts[name] = {"num_sets": len(found), "examples": examples}
    return facts


def find_same(rows: AuditRows) -> list[list[int]]:
    """Return the rows of each file that several rows have."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for row, image in enumerate(rows.images.tolist()):
        by_image[image].append(row)
    return [found for found in by_image.values() if len(found) > 1]


@dataclass(frozen=True)
class NearPairs:
    """Pairs of rows of different files whose features are too alike.

    Attributes:
        pairs: (P, 2) numbers of rows, the most alike first.
        similarities: (P,) cosines of standardised features.
        threshold: From which similarity on two rows are a pair; None for too few rows.
        median: Of the rows' similarities to their nearest neighbours.
        is_cut: Whether there were more pairs than are kept.
        pictures: How pictures were compared, None where no image was read.
    """

    pairs: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]
    threshold: float | None
    median: float | None
    is_cut: bool = False
    pictures: PicturePairs | None = None


@dataclass(frozen=True)
class PicturePairs:
    """How the pairs of ``NearPairs`` were confirmed by their pictures.

    Attributes:
        threshold: From which agreement on two pictures are a pair; None where there are too few
            pictures, or too little in them, to tell. The pairs are then those by features.
        num_compared: Pairs that were laid over each other.
        num_rejected: Of the pairs by features, those that their pictures do not confirm.
        is_confirmed: (P,) bool, whether the similarity is the agreement of pictures; else an image
            was not read, and it is the cosine of features.
        mirrored: (P,) bool.
        inverted: (P,) bool.
    """

    threshold: float | None
    num_compared: int
    num_rejected: int
    is_confirmed: npt.NDArray[np.bool_]
    mirrored: npt.NDArray[np.bool_]
    inverted: npt.NDArray[np.bool_]

    def describe(self, pair: int) -> dict[str, Any]:
        """Return what is told of a pair beside its rows."""
        return {
            "confirmed": bool(self.is_confirmed[pair]), "mirrored": bool(self.mirrored[pair]),
            "inverted": bool(self.inverted[pair]),
        }  # fmt: skip


def find_near(rows: AuditRows) -> NearPairs:
    """Return the pairs that are more alike than nearest neighbours of different images are.

    Similarity is the cosine of view 0, standardised with the cache's mean and standard deviation.
    The threshold comes from the rows' nearest neighbours (see ``choose_threshold``) and is never
    below ``FLOOR``. Memory: the features as float32, and blocks of 2,048 x 2,048 similarities.

    Raises:
        CacheError: If a feature is not finite.
    """
    none = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    if len(np.unique(rows.images)) < LEAST_ROWS:
        return NearPairs(*none, None, None)
    features = _directions(rows.cache)
    number, floor, is_cut = len(features), FLOOR, False
    nearest = np.full(number, -1, np.float32)
    kept, num_kept = [none], 0
    for i in range(0, number, _BLOCK_ROWS):
        for j in range(i, number, _BLOCK_ROWS):
            one, other = slice(i, i + _BLOCK_ROWS), slice(j, j + _BLOCK_ROWS)
            block = features[one] @ features[other].T
            block[rows.images[one, None] == rows.images[None, other]] = -1
            nearest[one] = np.maximum(nearest[one], block.max(axis=1))
            nearest[other] = np.maximum(nearest[other], block.max(axis=0))
            left, right = np.nonzero(block >= floor)
            found = left + i < right + j  # each pair once
            left, right = left[found], right[found]
            kept.append((np.stack([left + i, right + j], axis=1), block[left, right]))
            num_kept += len(left)
            if num_kept > 2 * _MAX_PAIRS:
                kept = [_most_alike(kept, _MAX_PAIRS)]
                num_kept, floor, is_cut = _MAX_PAIRS, float(kept[0][1].min()), True
    pairs, similarities = _most_alike(kept, _MAX_PAIRS)
    threshold, median = choose_threshold(nearest)
    alike = similarities >= threshold
    return NearPairs(pairs[alike], similarities[alike], threshold, median,
                     is_cut and bool(alike.all()))  # fmt: skip


def choose_threshold(nearest: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the similarity that nearest neighbours of different images do not reach, and a median.

    The similarity s to the nearest of many independent rows has, as ``atanh(s)``, about a Gumbel
    distribution: the largest of many values with an exponential tail. Its scale comes from median
    and median absolute deviation, so that copies among the rows count little; they are found with
    a first threshold, left out, and the second threshold is taken. It is passed by chance in one
    of twenty caches.

    Args:
        nearest: (N,) each row's similarity to its nearest neighbour.

    Returns:
        The threshold, never below ``FLOOR``, and the median similarity.
    """
    values = np.arctanh(np.clip(nearest.astype(np.float64), -_HIGHEST, _HIGHEST))
    threshold = math.inf
    for _ in range(2):
        null = values[values < threshold]
        if not len(null):
            break
        median = float(np.median(null))
        scale = float(np.median(np.abs(null - median))) / _GUMBEL_MAD
        mode = median + scale * math.log(math.log(2))
        threshold = mode + scale * math.log(len(values) / _FALSE_ALARMS)
    return min(max(math.tanh(threshold), FLOOR), _HIGHEST), math.tanh(median)


def join_copies(
    rows: AuditRows, same: Sequence[Sequence[int]], near: NearPairs | None
) -> list[list[int]]:
    """Return sets of rows that are joined by copies, directly or through other rows."""
    parents = list(range(len(rows.paths)))

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    links = [(found[0], row) for found in same for row in found[1:]]
    if near is not None:
        links += [(int(one), int(other)) for one, other in near.pairs]
    for one, other in links:
        parents[find(other)] = find(one)
    sets: dict[int, list[int]] = defaultdict(list)
    for row in range(len(parents)):
        sets[find(row)].append(row)
    return [found for found in sets.values() if len(found) > 1]


def copies_csv(rows: AuditRows, sets: Sequence[Sequence[int]]) -> str:
    """Return a CSV for ``select --table``: all rows, copies in one group with all of their groups.

    Raises:
        ConfigError: If a path stands in two splits, which such a table cannot tell apart.
    """
    first: dict[str, str] = {}
    for path, split in zip(rows.paths, rows.splits, strict=True):
        if path in first:
            raise ConfigError(
                "--csv", expected="every path once in the cache",
                found=f"{printable(path)} in {first[path]} and {split}", where=rows.cache.path,
                hint="Leave --csv out: a table for select names rows by their path",
            )  # fmt: skip
        first[path] = split
    numbers: list[int | None] = [None] * len(rows.paths)
    for number, found in enumerate(sets, 1):
        for row in found:
            numbers[row] = number
    groups = [group or None for group in rows.groups]
    names = [""] * len(rows.paths)
    for unit in build_units(groups, numbers):
        known = [group for group in (groups[row] for row in unit) if group is not None]
        if known or len(unit) > 1:
            for row in unit:
                names[row] = known[0] if known else rows.paths[unit[0]]
    lines = zip(rows.paths, names, ("" if n is None else n for n in numbers), strict=True)
    return csv_text(COLUMNS, lines)


def _most_alike(
    kept: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]], most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    pairs = np.concatenate([part for part, _ in kept])
    similarities = np.concatenate([part for _, part in kept])
    order = np.argsort(-similarities, kind="stable")[:most]
    return pairs[order], similarities[order]


def _directions(cache: Cache) -> npt.NDArray[np.float32]:
    """Return view 0 of all rows (N, D) float32, standardised, each of length 1 (or 0)."""
    number = sum(len(split) for split in cache.splits.values())
    rows = np.empty((number, cache.num_features), np.float32)
    start = 0
    for split in cache.splits.values():
        for i in range(0, len(split), _BLOCK_ROWS):
            numbers = np.arange(i, min(i + _BLOCK_ROWS, len(split)))
            part = split.read_rows(numbers)
            if not np.isfinite(part).all():
                raise CacheError(
                    f"features of split {split.name}", expected="finite numbers",
                    found="NaN or infinity", where=cache.path, hint="Extract it again",
                )  # fmt: skip
            rows[start + i : start + i + len(numbers)] = part
        start += len(split)
    mean = rows.mean(axis=0, dtype=np.float64)
    total = np.zeros(rows.shape[1])
    for block in _blocks(rows):
        total += ((block - mean) ** 2).sum(axis=0)
    spread = np.sqrt(total / number)
    varies = spread > 1e-6 * np.maximum(np.abs(mean), 1e-30)  # else rounding would be a feature
    inverse = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    for block in _blocks(rows):
        scaled = (block - mean) * inverse
        lengths = np.sqrt((scaled**2).sum(axis=1, keepdims=True))
        block[:] = scaled / np.where(lengths > 0, lengths, 1)
    return rows


def _blocks(rows: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    yield from (rows[i : i + _BLOCK_ROWS] for i in range(0, len(rows), _BLOCK_ROWS))
