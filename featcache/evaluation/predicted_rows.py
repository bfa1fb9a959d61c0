"""The labelled rows of a split with their predictions: mistakes, false negatives, CSV.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.csv_files import csv_text, join_names
from featcache.errors import CacheError, ConfigError, RunError
from featcache.evaluation.confusions import Confusion, count_confusions
from featcache.formatting import count, join_few
from featcache.heads.prediction import (
    COLUMNS,
    COLUMNS_OF_LABELS,
    predict_probs,
    prediction_table,
)
from featcache.heads.rows import RowNumbers, find_labelled
from featcache.heads.run import Run
from featcache.heads.streaming import StoredFeatures
from featcache.outputs import csv_kind
from featcache.runtime import Say

_DECISION = ("decision",)
CSV = csv_kind(
    "CSV of featcache evaluate", COLUMNS, COLUMNS_OF_LABELS, (*COLUMNS, *_DECISION),
    (*COLUMNS_OF_LABELS, *_DECISION),
)  # fmt: skip


@dataclass(frozen=True)
class PredictedRows:
    """The labelled rows of a split, with the probabilities that a head gives them.

    Attributes:
        classes: C names.
        paths: n paths.
        groups: n groups, empty where there are none.
        targets: (n,) class indices; or (n, C) of 0, 1 and NaN = unknown: several labels a row.
        probs: (n, C).
    """

    classes: tuple[str, ...]
    paths: list[str]
    groups: list[str]
    targets: npt.NDArray[Any]
    probs: npt.NDArray[np.float64]

    @property
    def has_labels(self) -> bool:
        """Whether a row has several labels."""
        return self.targets.ndim == 2

    @property
    def preds(self) -> npt.NDArray[Any]:
        """(n,) class indices; with several labels (n, C), whether each is above 0.5."""
        return self.probs > 0.5 if self.has_labels else self.probs.argmax(axis=1)

    def false_negatives(self, positive: str | None) -> list[str] | None:
        """Return the paths of rows of the positive class predicted otherwise; None without one."""
        if positive is None:
            return None
        index = self.classes.index(positive)
        if self.has_labels:
            missed = (self.targets[:, index] == 1) & ~self.preds[:, index]
        else:
            missed = (self.targets == index) & (self.preds != index)
        return [self.paths[i] for i in np.flatnonzero(missed)]

    def confusions(self) -> list[Confusion] | None:
        """Return which class is predicted as which, and how often; None with several labels."""
        if self.has_labels:
            return None
        return count_confusions(self.targets, self.preds, self.classes)

    def mistakes(self) -> list[dict[str, Any]]:
        """Return the wrong predictions, the most confident first: per row, or per row and label."""
        preds, probs = self.preds, self.probs
        if self.has_labels:
            return self._wrong_labels()
        rows = np.flatnonzero(preds != self.targets)
        by_confidence = sorted(rows, key=lambda i: (-probs[i, preds[i]], self.paths[i]))
        return [
            {
                "path": self.paths[i],
                "target": self.classes[self.targets[i]],
                "pred": self.classes[preds[i]],
                "prob": float(probs[i, preds[i]]),
            }
            for i in by_confidence
        ]

    def _wrong_labels(self) -> list[dict[str, Any]]:
        preds, confidence = self.preds, np.maximum(self.probs, 1 - self.probs)
        wrong = ~np.isnan(self.targets) & (preds != (self.targets == 1))
        places = zip(*np.nonzero(wrong), strict=True)
        by_confidence = sorted(places, key=lambda at: (-confidence[at], self.paths[at[0]], at[1]))
        return [
            {
                "path": self.paths[at[0]],
                "class": self.classes[at[1]],
                "target": int(not preds[at]),
                "pred": int(preds[at]),
                "prob": float(self.probs[at]),
            }
            for at in by_confidence
        ]

    def as_csv(self, decision: Sequence[Any] | None = None) -> str:
        """Return a CSV with a line per row.

        Args:
            decision: What ``Decisions.apply`` says of each row, for a column behind the prediction.
        """
        header, rows = prediction_table(
            self.classes, self.paths, self.groups, self.targets, self.probs
        )
        if decision is not None:
            place = len(COLUMNS_OF_LABELS if self.has_labels else COLUMNS)
            header.insert(place, *_DECISION)
            for row, chosen in zip(rows, decision, strict=True):
                row.insert(place, join_names(chosen) if self.has_labels else chosen)
        return csv_text(header, rows)


def labelled_rows(cache: Cache, split_name: str, say: Say) -> RowNumbers:
    """Return the numbers of the labelled rows of a split.

    Raises:
        CacheError: If there is no such split, or no labelled row in it.
    """
    split = cache.split(split_name)
    labelled = find_labelled(split.targets)
    if not len(labelled):
        raise CacheError(
            f"split {split_name}", expected="labelled rows", found="none", where=cache.path,
            hint="Use featcache predict for images without a class",
        )  # fmt: skip
    if len(labelled) < len(split):
        say(f"{count(len(split) - len(labelled), 'unlabelled row')} left out")
    return labelled


def predict_rows(
    run: Run, cache: Cache, split_name: str, labelled: RowNumbers, say: Say, *, average_views: bool
) -> PredictedRows:
    """Return labelled rows of a split with the head's probabilities.

    Raises:
        CacheError: If the cache has another kind of task.
        RunError: If its classes or its features are not the run's.
        ConfigError: If there are no views to average.
    """
    split = cache.split(split_name)
    class_indices = _match_classes(run, cache, say)
    _check_features(run, cache)
    if average_views and split.num_views == 1:
        raise ConfigError(
            "--average-views", expected="several views of a row", found=f"one in {split_name}",
            where=cache.path, hint="Views are of train, and of folders without splits (split all)",
        )  # fmt: skip
    features = StoredFeatures(split, labelled, plain=not average_views)
    groups = split.groups or [""] * len(split)
    return PredictedRows(
        classes=run.classes,
        paths=[split.paths[i] for i in labelled],
        groups=[groups[i] for i in labelled],
        targets=_to_run_classes(run, class_indices, split.targets[labelled]),
        probs=predict_probs(run.head, run.state, features, run.task),
    )


def _to_run_classes(
    run: Run, class_indices: npt.NDArray[np.int64], targets: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Return the cache's targets as targets of the run; a label that the cache lacks is unknown."""
    if targets.ndim == 1:
        indices: npt.NDArray[Any] = class_indices[targets]
        return indices
    matched = np.full((len(targets), len(run.classes)), np.nan, np.float32)
    matched[:, class_indices] = targets
    return matched


def _match_classes(run: Run, cache: Cache, say: Say) -> npt.NDArray[np.int64]:
    """Return the run's index of each of the cache's classes."""
    if cache.task != run.task:
        raise CacheError(
            "cache", expected=f"a {run.task} cache, as the run was trained on",
            found=f"a {cache.task} one", where=cache.path,
            hint="Evaluate on another cache, or train a head on this one",
        )  # fmt: skip
    unknown = [name for name in cache.classes if name not in run.classes]
    if unknown:
        raise RunError(
            "classes", expected="those of the run, " + join_few(run.classes),
            found="also " + join_few(unknown), where=cache.path,
            hint="Evaluate on a cache without them, or train on one with them",
        )  # fmt: skip
    missing = [name for name in run.classes if name not in cache.classes]
    if missing:
        say(f"this cache has no class {join_few(missing)}: matched the others by name")
    return np.array([run.classes.index(name) for name in cache.classes], np.int64)


def _check_features(run: Run, cache: Cache) -> None:
    found = cache.num_features
    if found != run.head.num_features:
        raise RunError(
            "features", expected=f"{run.head.num_features} per image", found=found,
            where=cache.path, hint="Extract the images with the run's backbone",
        )  # fmt: skip
