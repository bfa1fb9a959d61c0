"""Loops over values of a batch, compiled, for ``head_kernels``.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part, summing

_Floats = npt.NDArray[np.float32]

_SQUARE = 16


@summing
def sum_of(values: _Floats) -> np.float32:
    """Return the sum of values (n,)."""
    total = np.float32(0)
    for j in range(len(values)):
        total += values[j]
    return total


@summing
def sum_of_products(left: _Floats, right: _Floats) -> np.float32:
    """Return the sum of products of values, both (n,)."""
    total = np.float32(0)
    for j in range(len(left)):
        total += left[j] * right[j]
    return total


@part
def add_products(left: _Floats, right: _Floats, sums: _Floats) -> None:
    """Add the column sums of products (n, m) to sums (m,).

    Four rows at a time: the sums' own traffic would be all.
    """
    whole = left.shape[0] // 4 * 4
    for row in range(0, whole, 4):
        for j in range(left.shape[1]):
            sums[j] += (
                left[row, j] * right[row, j]
                + left[row + 1, j] * right[row + 1, j]
                + left[row + 2, j] * right[row + 2, j]
                + left[row + 3, j] * right[row + 3, j]
            )
    for row in range(whole, left.shape[0]):
        for j in range(left.shape[1]):
            sums[j] += left[row, j] * right[row, j]


@part
def scale_and_shift(values: _Floats, scale: np.float32, shift: np.float32, out: _Floats) -> None:
    """Set ``out`` (n,) to values times scale plus shift."""
    for j in range(len(values)):
        out[j] = values[j] * scale + shift


@part
def turn(values: _Floats, out: _Floats) -> None:
    """Set ``out`` (m, n) to values (n, m), turned.

    A square of 16 at a time: down whole columns each value costs a cache line, at a power of two of
    them even one that was just used.
    """
    for top in range(0, values.shape[0], _SQUARE):
        bottom = min(top + _SQUARE, values.shape[0])
        for left in range(0, values.shape[1], _SQUARE):
            for j in range(left, min(left + _SQUARE, values.shape[1])):
                for i in range(top, bottom):
                    out[j, i] = values[i, j]


@part
def mask_units(values: _Floats, mask: _Floats) -> None:
    """Multiply (W, B) by a mask (B, W), if there is one."""
    if mask.size:
        for row in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                values[j, row] *= mask[row, j]
