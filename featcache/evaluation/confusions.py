"""Which class is taken for which, and how often: the cells of a confusion matrix that are not 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.csv_files import csv_text

COLUMNS = ("target", "pred", "num_samples")


class Confusion(NamedTuple):
    """A cell of a confusion matrix."""

    target: str
    pred: str
    number: int


def count_confusions(
    targets: npt.NDArray[Any], preds: npt.NDArray[Any], classes: Sequence[str]
) -> list[Confusion]:
    """Return the cells that are not 0, the largest first.

    Of many classes most cells are 0: of C classes there are C^2 cells, and at most a cell a row.

    Args:
        targets: (N,) class indices.
        preds: (N,) class indices.
        classes: C names.
    """
    cells, numbers = np.unique(targets * len(classes) + preds, return_counts=True)
    order = np.argsort(-numbers, kind="stable")
    return [
        Confusion(classes[cell // len(classes)], classes[cell % len(classes)], number)
        for cell, number in zip(cells[order].tolist(), numbers[order].tolist(), strict=True)
    ]


def to_matrix(confusions: Iterable[Confusion], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the whole matrix (C, C), rows = target."""
    index = {name: i for i, name in enumerate(classes)}
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    for target, pred, number in confusions:
        matrix[index[target], index[pred]] = number
    return matrix


def as_csv(confusions: Iterable[Confusion]) -> str:
    """Return a CSV with a line per cell that is not 0."""
    return csv_text(COLUMNS, confusions)
