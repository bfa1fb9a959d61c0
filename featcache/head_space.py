"""Where a compiled step keeps what, and where a head's parameters lie: for ``head_kernels``.

All that a step works in is one array, ``space``, the same from phase to phase: first what concerns
the rows, then what concerns each half of the first layer, then layer after layer.

Reads: nothing. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

TILE_ROWS = 64  # 64 x 1280 of float32 lie in a second-level cache beside what they are added to


def space_size(widths: _Ints, num_rows: int) -> int:
    """Return how many float32 a step of ``num_rows`` rows works in."""
    return at_layer(widths, num_rows, len(widths) - 1)


@part
def at_layer(widths: _Ints, num_rows: int, layer: int) -> int:
    """Return where the outputs of a layer begin.

    Of each: what it puts out, that normalised (both (width, B)), its gradient, 1 / deviations.
    Before them: the rows normalised and as the first layer sees them (both (B, D)), their means
    and variances; and for both halves a tile and the gradients of the first batch norm.
    """
    wide = int(widths[0])
    start = 2 * (num_rows + 1) * wide + 2 * (TILE_ROWS + 2) * wide
    for i in range(1, layer + 1):
        start += int(widths[i]) * (3 * num_rows + 1)
    return start


@part
def matrix(flat: _Floats, start: int, rows: int, columns: int) -> _Floats:
    """Return a part of a flat array as a matrix."""
    return flat[start : start + rows * columns].reshape(rows, columns)


@part
def of_rows(
    widths: _Ints, num_rows: int, space: _Floats
) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Return the rows normalised, as the first layer sees them, their means and variances."""
    wide = widths[0]
    size = num_rows * wide
    return (
        matrix(space, 0, num_rows, wide), matrix(space, size, num_rows, wide),
        space[2 * size :][:wide], space[2 * size + wide :][:wide],
    )  # fmt: skip


@part
def of_half(
    widths: _Ints, num_rows: int, half: int, space: _Floats
) -> tuple[_Floats, _Floats, _Floats]:
    """Return a tile, flat, and the gradients of the first batch norm's weight and bias."""
    wide = widths[0]
    start = 2 * (num_rows + 1) * wide + half * (TILE_ROWS + 2) * wide
    size = TILE_ROWS * wide
    return space[start:][:size], space[start + size :][:wide], space[start + size + wide :][:wide]


@part
def outputs(
    widths: _Ints, num_rows: int, layer: int, space: _Floats
) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Return a layer's outputs, those normalised, its gradient and 1 / deviations."""
    at, wide = at_layer(widths, num_rows, layer), widths[layer + 1]
    size = wide * num_rows
    return (
        matrix(space, at, wide, num_rows), matrix(space, at + size, wide, num_rows),
        matrix(space, at + 2 * size, wide, num_rows), space[at + 3 * size :][:wide],
    )  # fmt: skip


@part
def at_params(widths: _Ints, layer: int) -> int:
    """Return where the parameters of a layer begin: those of its batch norm."""
    at = 0
    for i in range(layer):
        at += 2 * widths[i] + widths[i + 1] * (widths[i] + 1)
    return at


@part
def half_of_units(widths: _Ints, half: int) -> tuple[int, int]:
    """Return the first unit of half of the first layer, and the one after its last."""
    cut = (widths[1] + 1) // 2
    return (0, cut) if half == 0 else (cut, widths[1])
