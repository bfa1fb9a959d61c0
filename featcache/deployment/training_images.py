"""The training images of a run, by their features: the mean of them, and those nearest an image.

Reads: the cache that a run was trained on, where it is at hand. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache
from featcache.errors import CacheError
from featcache.evaluation.nearest_rows import find_nearest, to_directions
from featcache.evaluation.novelty import find_own_cache, training_splits
from featcache.heads.head import norm_and_linear, split_members
from featcache.heads.run import Run

_BLOCK_ROWS = 4096
_SAME = 1e-6  # distance, 1 less the cosine, below which two features are one image's


@dataclass(frozen=True)
class TrainingImages:
    """What a head was trained on.

    Attributes:
        cache: The cache, several side by side as one; None where it is gone or has changed.
        mean: (D,) float64, the mean of the features of train (or all).
        mean_of: Where it is from: ``cache``, or ``head``: the running mean that the head's first
            batch norm kept while it was trained, which follows the last batches most closely.
    """

    cache: Cache | None
    mean: npt.NDArray[np.float64]
    mean_of: str

    @classmethod
    def of(cls, run: Run) -> TrainingImages:
        """Return those of a run.

        Raises:
            CacheError: If a stored feature is not finite, or the cache was cut short.
        """
        cache = find_own_cache(run)
        if cache is not None:
            return cls(cache, _mean(training_splits(cache)[0]), "cache")
        norm, _ = norm_and_linear(run.head, 0)
        means = [state[f"{norm}.running_mean"] for state in split_members(run.state)]
        return cls(None, np.mean(means, axis=0, dtype=np.float64), "head")

    def find_nearest(self, features: npt.NDArray[np.float32], k: int) -> list[dict[str, Any]]:
        """Return the k nearest rows of train (or all) and valid, the nearest first.

        Args:
            features: (D,) of an image.
            k: From 1; of fewer rows, all.

        Returns:
            Of each ``path``, ``split``, ``classes`` (its names; of several labels those that are
            1), ``distance`` (1 less the cosine of the features), and ``same``, whether it is the
            image itself.
        """
        found = list[tuple[float, CacheSplit, int]]()
        query, none = to_directions(features[None]), np.full(1, -1)
        for split in [] if self.cache is None else training_splits(self.cache):
            for first, block in _blocks(split):
                units = np.zeros(len(block), np.int64)
                rows, distances = find_nearest(query, to_directions(block), k, none, units)
                pairs = zip(distances[0].tolist(), rows[0].tolist(), strict=True)
                found += [(distance, split, first + row) for distance, row in pairs]
            found = sorted(found, key=lambda entry: entry[0])[:k]
        return [
            {
                "path": split.paths[row], "split": split.name, "classes": self._classes(split, row),
                "distance": distance, "same": distance < _SAME,
            }
            for distance, split, row in found
        ]  # fmt: skip

    def _classes(self, split: CacheSplit, row: int) -> list[str]:
        assert self.cache is not None
        target, names = split.targets[row], self.cache.classes
        if np.ndim(target) == 0:
            return [names[target]] if target >= 0 else []
        return [name for name, value in zip(names, target.tolist(), strict=True) if value == 1]


def _blocks(split: CacheSplit) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield the plain features of a split in blocks, each with the number of its first row."""
    for first in range(0, len(split), _BLOCK_ROWS):
        yield first, split.read_rows(np.arange(first, min(first + _BLOCK_ROWS, len(split))))


def _mean(split: CacheSplit) -> npt.NDArray[np.float64]:
    total = sum(block.sum(axis=0, dtype=np.float64) for _, block in _blocks(split))
    mean: npt.NDArray[np.float64] = np.asarray(total / max(len(split), 1))
    if not np.isfinite(mean).all():
        raise CacheError(
            f"features of split {split.name}", expected="finite numbers", found="NaN or infinity",
            hint="Extract the images again",
        )  # fmt: skip
    return mean
