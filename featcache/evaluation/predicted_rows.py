"""The labelled rows of a split with their predictions: mistakes, false negatives, CSV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.files import csv_text, join_names, prob_columns


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

    def as_csv(self) -> str:
        """Return a CSV with a line per row."""
        if self.has_labels:
            header = ["path", "group", "targets", "unknown", "preds"]
            cells = zip(
                self._join(self.targets == 1), self._join(np.isnan(self.targets)),
                self._join(self.preds), strict=True,
            )  # fmt: skip
        else:
            header = ["path", "group", "target", "pred"]
            names = ([self.classes[i] for i in which] for which in (self.targets, self.preds))
            cells = zip(*names, strict=True)
        rows = zip(self.paths, self.groups, cells, self.probs.tolist(), strict=True)
        header += prob_columns(self.classes)
        return csv_text(
            header, ([name, group, *words, *probs] for name, group, words, probs in rows)
        )

    def _join(self, chosen: npt.NDArray[np.bool_]) -> Iterable[str]:
        return (join_names(self.classes[c] for c in np.flatnonzero(row)) for row in chosen)
