"""The rows that an audit trains on, and what a linear head says of each without having seen it.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.errors import CacheError
from featcache.evaluation.nearest_rows import Array, Numbers, number_units, to_directions
from featcache.heads.rows import labelled_part, training_source
from featcache.runtime import Say
from featcache.sweeps.folds import Pair, Pool

NUM_FOLDS = 5
LEAST_PER_CLASS = 20  # four rows of each class in a fold: a recall of fewer is a coin
_MOST_TRAINED_ON = 10_000  # rows of a fold's training part, thinned: a linear fit takes a minute
_STRENGTH = 0.01  # C of the linear head on standardised features; fixed, so nothing is chosen


class FoldedRows:
    """The labelled rows of train and valid, or of all, in folds that keep groups together.

    Test is not among them. Everything is computed when it is first asked for, and once.

    Args:
        cache: The cache.
        say: Where lines for people go.

    Attributes:
        cache: The cache.
        splits: Names of the splits.
        num_rows: N.
        numbers: (N,) of the rows among all rows of the cache, split after split.
        targets: (N,) int64; (N, C) for multilabel caches.

    Raises:
        CacheError: If there is no split to train on.
    """

    def __init__(self, cache: Cache, say: Say) -> None:
        names = [training_source(cache), *(["valid"] if "valid" in cache.splits else [])]
        parts = [labelled_part(cache, name, "train" if not i else "valid")
                 for i, name in enumerate(names)]  # fmt: skip
        starts, start = dict[str, int](), 0
        for name, split in cache.splits.items():
            starts[name], start = start, start + len(split)
        self.cache, self.splits, self._say = cache, tuple(names), say
        self._parts = [part for part in parts if len(part.rows)]
        self.numbers: Numbers = np.concatenate([starts[p.split.name] + p.rows for p in parts])
        self.num_rows = len(self.numbers)
        self.targets: npt.NDArray[Any] = np.concatenate([part.targets for part in parts])

    @cached_property
    def pool(self) -> Pool | None:
        """The rows with their features, None where there are none or memory has no room."""
        if not self._parts:
            return None
        pool = Pool.of(self.cache, self._parts, say=self._say)
        return pool if isinstance(pool.plain, np.ndarray) else None

    @cached_property
    def fault(self) -> str | None:
        """Why nothing can be measured of each row's class, None where it can."""
        if self.targets.ndim == 2:
            return "the rows have several labels, not one class each"
        if not self.num_rows:
            return f"no labelled rows in {' and '.join(self.splits)}"
        return "the features are larger than the memory" if self.pool is None else None

    @cached_property
    def directions(self) -> Array:
        """(N, D) features of length 1."""
        assert self.pool is not None
        assert isinstance(self.pool.plain, np.ndarray)
        return to_directions(self.pool.plain)

    @cached_property
    def units(self) -> Numbers:
        """(N,) a number for each group and for copies of one image."""
        assert self.pool is not None
        return number_units(self.pool.units)

    @cached_property
    def folds(self) -> list[Pair] | str:
        """Pairs of rows to train on and to judge, or why there are none."""
        if self.targets.ndim == 2:
            return str(self.fault)
        counts = np.bincount(self.targets, minlength=len(self.cache.classes))
        if len(counts) < 2 or counts.min() < LEAST_PER_CLASS:
            return (
                f"a class has {counts.min(initial=self.num_rows):,} labelled rows of "
                f"{' and '.join(self.splits)}, and at least {LEAST_PER_CLASS} of each of two "
                "classes are needed"
            )
        if self.pool is None:
            return str(self.fault)
        try:
            return self.pool.make_folds(NUM_FOLDS, 0)
        except CacheError:
            return f"a class has images in fewer than {NUM_FOLDS} groups"

    @cached_property
    def probs(self) -> npt.NDArray[np.float64]:
        """(N, C) out-of-fold probabilities; asked for only where there are folds."""
        assert self.pool is not None
        assert not isinstance(self.folds, str)
        return _probs_of(self.heads, self.pool.plain, self.targets, self.folds)

    @cached_property
    def heads(self) -> list[Any]:
        """A head for each fold, of the other folds' rows; asked for only where there are folds."""
        assert self.pool is not None
        assert not isinstance(self.folds, str)
        return [*fit_heads(self.pool.plain, self.targets, self.folds)]

    def of_class(self, rows: Numbers, targets: npt.NDArray[np.int64], names: list[str]) -> Pool:
        """Return some rows as a pool with other targets, to be told apart within them.

        Args:
            rows: (n,) ascending.
            targets: (n,) indices of ``names``.
            names: Of the new classes.
        """
        pool = self.pool
        assert pool is not None
        place = {row: i for i, row in enumerate(rows.tolist())}
        units = [[place[row] for row in unit if row in place] for unit in pool.units]
        return replace(
            pool, features=pool.plain[rows], plain=pool.plain[rows], targets=targets,
            units=[unit for unit in units if unit], names=[pool.names[i] for i in rows.tolist()],
            classes=tuple(names),
        )  # fmt: skip


def out_of_fold_probs(
    features: Any, targets: npt.NDArray[Any], folds: list[Pair]
) -> npt.NDArray[np.float64]:
    """Return probabilities (N, C) of rows (N, D), each by a linear head of the other folds' rows.

    The head is a logistic regression on standardised features, with balanced classes. Classes have
    equal weight, so its probabilities are those of equally frequent classes.

    Args:
        features: (N, D).
        targets: (N,) indices of C classes, each of which is outside every fold.
        folds: Pairs of rows to train on and to judge; each row is judged once.
    """
    return _probs_of(fit_heads(features, targets, folds), features, targets, folds)


def fit_heads(features: Any, targets: npt.NDArray[Any], folds: list[Pair]) -> Iterator[Any]:
    """Yield a pipeline of a scaler and a logistic regression for each fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for train, _ in folds:
        rows = thin(train)
        head = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=2000),
        )
        yield head.fit(features[rows], targets[rows])


def _probs_of(
    heads: Iterable[Any], features: Any, targets: npt.NDArray[Any], folds: list[Pair]
) -> npt.NDArray[np.float64]:
    probs = np.zeros((len(targets), int(targets.max()) + 1))
    for head, (_, judged) in zip(heads, folds, strict=True):
        probs[judged] = head.predict_proba(features[judged])
    return probs


def thin(rows: Numbers) -> Numbers:
    """Return rows to train a linear head on: all, or a sample of the most that are affordable."""
    if len(rows) <= _MOST_TRAINED_ON:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), _MOST_TRAINED_ON, replace=False)
    return rows[np.sort(chosen)]
