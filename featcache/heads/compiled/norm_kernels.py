"""Batch norms of ``head_kernels``: their statistics, and rows normalised for all heads.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part
from featcache.heads.compiled.loops import add_products, turn

_Floats = npt.NDArray[np.float32]

BATCH_NORM_EPS = np.float32(1e-5)
_BATCH_NORM_MOMENTUM = np.float32(0.1)

_ONE = np.float32(1)


@part
def track(running: _Floats, j: int, current: np.float32) -> None:
    """Move a running statistic a tenth of the way to that of a batch."""
    running[j] += _BATCH_NORM_MOMENTUM * (current - running[j])


@part
def normalise_rows(
    rows: _Floats, normed: _Floats, turned: _Floats, mean: _Floats, variance: _Floats
) -> None:
    """Normalise columns; set their means, and variances with Bessel's correction."""
    num_rows, wide = rows.shape
    share, inverse = _ONE / np.float32(num_rows), np.empty(wide, np.float32)
    mean[:], variance[:] = np.float32(0), np.float32(0)
    for row in range(num_rows):
        for j in range(wide):
            mean[j] += rows[row, j]
    for j in range(wide):
        mean[j] *= share
    for row in range(num_rows):
        for j in range(wide):
            normed[row, j] = rows[row, j] - mean[j]
    add_products(normed, normed, variance)
    for j in range(wide):
        inverse[j] = _ONE / np.sqrt(variance[j] * share + BATCH_NORM_EPS)
    for row in range(num_rows):
        for j in range(wide):
            normed[row, j] *= inverse[j]
    turn(normed, turned)
    correction = np.float32(1 / (num_rows - 1))
    for j in range(wide):
        variance[j] *= correction
