"""Novelty: is an image farther from every training image than those are from each other?

Reads: the cache that a run was trained on, where it is at hand. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache, open_cache
from featcache.cache.side_by_side import join_caches
from featcache.data.stratification import build_units
from featcache.errors import FeatcacheError
from featcache.evaluation.nearest_rows import (
    Array,
    Numbers,
    find_nearest,
    number_units,
    sample_rows,
    to_directions,
)
from featcache.heads.rows import RowNumbers, training_source
from featcache.heads.run import Run
from featcache.heads.run_caches import cache_paths, fetch_caches, is_own
from featcache.heads.trained_rows import TrainedRows

QUANTILE = 0.999
_MOST_ROWS = 2000  # compared with each other in 0.2 s on two cores
_HASHED_BYTES = 1 << 28  # a larger cache is not hashed again for one image


@dataclass(frozen=True)
class Novelty:
    """The training images of a run, and how far apart they are.

    Distance is 1 less the cosine of the features of two images, as for the outliers of ``audit``.
    The threshold is the 99.9 % quantile of the training images' distances to the nearest of another
    group, below 1,000 of them their largest.

    Attributes:
        rows: (N, D) features of length 1, of train and valid (or of all), or a sample of them; of
            an ensemble that was trained on rows of test (``crossval --with-test``), those too.
        threshold: Beyond it, an image is unlike any training image.
        num_rows: Rows of which they are a sample, or all.
    """

    rows: Array
    threshold: float
    num_rows: int

    @classmethod
    def of(cls, run: Run) -> Novelty | None:
        """Return it for a run, None where its cache is gone or has changed, or is too small."""
        cache = find_own_cache(run)
        try:
            return None if cache is None else cls._measure(cache, _seen_of_test(run, cache))
        except (FeatcacheError, OSError):
            return None

    @classmethod
    def _measure(cls, cache: Cache, of_test: RowNumbers) -> Novelty | None:
        splits = training_splits(cache)
        numbers = [np.arange(len(split)) for split in splits]
        if len(of_test):
            splits, numbers = [*splits, cache.splits["test"]], [*numbers, of_test]
        owners = np.repeat(np.arange(len(splits)), [len(rows) for rows in numbers])
        places = np.concatenate(numbers)
        chosen = sample_rows(len(owners), _MOST_ROWS)
        features, groups, images = [], list[str | None](), list[bytes | None]()
        for i, split in enumerate(splits):
            rows = places[chosen[owners[chosen] == i]]
            features.append(split.read_rows(rows))
            groups += [split.groups[row] if split.groups else None for row in rows.tolist()]
            images += [image.tobytes() if image.any() else None for image in
                       split.image_sha256[rows]]  # fmt: skip
        vectors = np.concatenate(features)
        if not np.isfinite(vectors).all():
            return None
        units = number_units(build_units(groups, images))
        if units.max(initial=0) < 1:  # nothing to measure a distance to
            return None
        directions = to_directions(vectors)
        nearest = _nearest(directions, directions, units, units)
        threshold = float(np.quantile(nearest, QUANTILE, method="higher"))
        return cls(directions, threshold, len(owners))

    def find_unlike(self, features: npt.NDArray[Any]) -> tuple[bool, ...]:
        """Return which images (n, D) are farther from every row than the threshold."""
        queries, own = np.full(len(features), -1), np.zeros(len(self.rows), np.int64)
        distances = _nearest(to_directions(features), self.rows, queries, own)
        return tuple((distances > self.threshold).tolist())

    @property
    def facts(self) -> dict[str, Any]:
        """``threshold``, ``num_rows`` and ``num_compared_with``, as JSON values."""
        return {
            "threshold": self.threshold, "num_rows": self.num_rows,
            "num_compared_with": len(self.rows),
        }  # fmt: skip


def find_own_cache(run: Run) -> Cache | None:
    """Return what a run was trained on, None where it is gone or has changed.

    Several caches are side by side. Small ones are hashed, and of those in a store only small ones
    are fetched for this.
    """
    try:
        fetch_caches(run, max_bytes=_HASHED_BYTES)
        paths = cache_paths(run)
        is_small = sum(path.stat().st_size for path in paths) <= _HASHED_BYTES
        cache = join_caches([open_cache(path, verify=is_small) for path in paths])
        is_same = is_own(run, cache) and cache.num_features == run.head.num_features
        return cache if is_same else None
    except (FeatcacheError, OSError):
        return None


def training_splits(cache: Cache) -> list[CacheSplit]:
    """Return the splits that a head saw: ``train`` (or ``all``), and ``valid`` if there is one."""
    names = [training_source(cache), *(["valid"] if "valid" in cache.splits else [])]
    return [cache.splits[name] for name in names]


def _seen_of_test(run: Run, cache: Cache) -> RowNumbers:
    """Return the rows of test that a head of an ensemble was trained on or chosen by."""
    known = None
    if run.members and "test" in cache.splits:
        known = TrainedRows.read(run.path, run.weights_sha256)
    if known is None:
        return np.empty(0, np.int64)
    split = cache.splits["test"]
    seen = known.find(split, np.arange(len(split)))
    return np.flatnonzero(seen.trained | seen.validated)


def _nearest(queries: Array, rows: Array, query_units: Numbers, row_units: Numbers) -> Array:
    distances: Array = find_nearest(queries, rows, 1, query_units, row_units)[1][:, 0]
    return distances
