"""Nearest rows by the cosine of their features, in blocks: no N x N matrix is made.

Features are taken as they are. Of 284 X-rays (EfficientNet-Lite0) with 30 turned by 180 or 90
degrees or inverted, the distance to the tenth nearest row of the class tells those with ROC AUCs of
0.99, 0.98 and 0.96; standardised first, as for copies, with 0.87, 0.77 and 0.77.

Reads nothing. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST_ROWS = 4096
"""Rows that others are compared with: of more, a sample drawn with a fixed seed."""
_BLOCK_ROWS = 1024

Array = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


def to_directions(features: npt.NDArray[np.floating]) -> Array:
    """Return features (N, D) as float32 vectors of length 1; rows of zeros stay zeros."""
    rows: Array = np.array(features, np.float32)
    for i in range(0, len(rows), _BLOCK_ROWS):
        block = rows[i : i + _BLOCK_ROWS].astype(np.float64)
        lengths = np.sqrt((block**2).sum(axis=1, keepdims=True))
        rows[i : i + _BLOCK_ROWS] = block / np.where(lengths > 0, lengths, 1)
    return rows


def sample_rows(number: int, most: int = MOST_ROWS) -> Numbers:
    """Return the numbers of all of so many rows, or of a sample of ``most``, ascending."""
    if number <= most:
        return np.arange(number)
    return np.sort(np.random.default_rng(0).choice(number, most, replace=False))


def number_units(units: Sequence[Sequence[int]]) -> Numbers:
    """Return the number of each row's unit (N,), for units that hold each row once."""
    numbers = np.empty(sum(map(len, units)), np.int64)
    for i, unit in enumerate(units):
        numbers[list(unit)] = i
    return numbers


def find_nearest(
    queries: Array, rows: Array, k: int, query_units: Numbers, row_units: Numbers
) -> tuple[Numbers, Array]:
    """Return the k nearest rows of each query that are not of its own unit, the nearest first.

    A unit is a group or copies of one image: a patient's other images would hide what is odd.

    Args:
        queries: (Q, D) of length 1.
        rows: (N, D) of length 1.
        k: From 1; of fewer rows, all.
        query_units: (Q,) numbers of units, -1 for a unit of no row.
        row_units: (N,).

    Returns:
        Numbers (Q, k) of rows and their distances (Q, k), 1 less the cosine. Where a query's unit
        leaves too few rows, the last distances are infinite.
    """
    k = min(k, len(rows))
    numbers = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), np.float32)
    for i in range(0, len(queries), _BLOCK_ROWS):
        place = slice(i, i + _BLOCK_ROWS)
        block = 1 - queries[place] @ rows.T
        np.maximum(block, 0, out=block)
        block[query_units[place, None] == row_units[None, :]] = np.inf
        nearest = np.argpartition(block, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(block, nearest, axis=1)
        order = np.argsort(values, axis=1, kind="stable")
        numbers[place] = np.take_along_axis(nearest, order, axis=1)
        distances[place] = np.take_along_axis(values, order, axis=1)
    return numbers, distances
