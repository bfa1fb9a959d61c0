"""Where a compiled step keeps what, and where a head's parameters lie: for ``head_kernels``.

All that a step works in is one array, ``space``, which all threads share: first what concerns the
rows, then the tiles' gradients of the first batch norm, then layer after layer. A layer's weights
are worked on in tiles of units.

Reads: nothing. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

FORWARD_UNITS = 128  # of the first layer, in a piece of the forward pass
TILE_ROWS = 64  # units: so few that two threads end together, so many that taking them is free


@part
def _at_norm_grads(widths: _Ints, num_rows: int) -> int:
    return (4 * num_rows + 2) * int(widths[0])


@part
def at_layer(widths: _Ints, num_rows: int, layer: int) -> int:
    """Return where the outputs of a layer begin."""
    start = _at_norm_grads(widths, num_rows) + 2 * tiles_of(widths, 0) * int(widths[0])
    for i in range(1, layer + 1):
        start += int(widths[i]) * (5 * num_rows + 1)
    return start


@part
def matrix(flat: _Floats, start: int, rows: int, columns: int) -> _Floats:
    """Return a part of a flat array as a matrix."""
    return flat[start : start + rows * columns].reshape(rows, columns)


@part
def of_rows(
    widths: _Ints, num_rows: int, space: _Floats
) -> tuple[_Floats, _Floats, _Floats, _Floats, _Floats, _Floats]:
    """Return the rows normalised, (B, D) and turned, (D, B); as the first layer sees them, turned.

    Then those once more (B, D), which linear heads need; the rows' means and variances (D,).
    """
    wide = widths[0]
    size = num_rows * wide
    return (
        matrix(space, 0, num_rows, wide), matrix(space, size, wide, num_rows),
        matrix(space, 2 * size, wide, num_rows), matrix(space, 3 * size, num_rows, wide),
        space[4 * size :][:wide], space[4 * size + wide :][:wide],
    )  # fmt: skip


@part
def norm_grads_of(widths: _Ints, num_rows: int, tile: int, space: _Floats) -> _Floats:
    """Return a tile's share (2, D) of the gradients of the first batch norm's weight and bias."""
    wide = widths[0]
    return matrix(space, _at_norm_grads(widths, num_rows) + 2 * tile * wide, 2, wide)


@part
def outputs(
    widths: _Ints, num_rows: int, layer: int, space: _Floats
) -> tuple[_Floats, _Floats, _Floats, _Floats, _Floats, _Floats]:
    """Return what a layer puts out, that normalised, and as the next layer sees it.

    Then the gradient of what it puts out, all of them (width, B); what the next layer sees once
    more, (B, width); and 1 / deviations (width,).
    """
    at, wide = at_layer(widths, num_rows, layer), widths[layer + 1]
    size = wide * num_rows
    return (
        matrix(space, at, wide, num_rows), matrix(space, at + size, wide, num_rows),
        matrix(space, at + 2 * size, wide, num_rows), matrix(space, at + 3 * size, wide, num_rows),
        matrix(space, at + 4 * size, num_rows, wide), space[at + 5 * size :][:wide],
    )  # fmt: skip


@part
def at_params(widths: _Ints, layer: int) -> int:
    """Return where the parameters of a layer begin: those of its batch norm."""
    at = 0
    for i in range(layer):
        at += 2 * widths[i] + widths[i + 1] * (widths[i] + 1)
    return at


@part
def tiles_of(widths: _Ints, layer: int) -> int:
    """Return in how many tiles a layer's weights are moved."""
    return (int(widths[layer + 1]) + TILE_ROWS - 1) // TILE_ROWS


@part
def count_tiles(widths: _Ints) -> int:
    """Return in how many tiles the weights of all layers are moved."""
    count = 0
    for layer in range(len(widths) - 1):
        count += tiles_of(widths, layer)
    return count


@part
def count_forward(widths: _Ints) -> int:
    """Return in how many pieces the first layer's forward pass is cut."""
    return (int(widths[1]) + FORWARD_UNITS - 1) // FORWARD_UNITS
