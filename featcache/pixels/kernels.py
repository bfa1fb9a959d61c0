"""The inner loops of image decoding, compiled by Numba. Imported by ``acceleration``, when needed.

Importing this module compiles them, or loads them from Numba's cache. All release the GIL.

Some code is written as Numba needs it. It does not check an index for being negative if it is
unsigned or counts up from zero (with the check, narrowing 1024 x 1024 to 224 took 4.8 ms instead of
0.8). Sums of int32 become int64, in half as many SIMD lanes, unless they are cast. Bytes are cast
to int64 before subtracting: ``int`` would leave them unsigned.

Reads: arrays. Writes: the array given last. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import compiled, part

_Bytes = npt.NDArray[np.uint8]

WEIGHT_BITS = 22
"""Pillow's fixed point: 32 bits, minus 8 for the pixel, minus 2 for bicubic's overshoot."""

_HALF = 1 << (WEIGHT_BITS - 1)


# --- PNG's row filters. ``step`` is the number of bytes from a pixel to the next.


@part
def _add_left(source: _Bytes, step: int, row: _Bytes) -> None:
    for channel in range(step):
        value = np.uint8(0)
        for x in range(channel, len(row), step):
            value = np.uint8(value + source[x])
            row[x] = value


@part
def _add_average(above: _Bytes, source: _Bytes, step: int, row: _Bytes) -> None:
    for channel in range(step):
        left = 0
        for x in range(channel, len(row), step):
            left = (source[x] + ((left + above[x]) >> 1)) & 255
            row[x] = left


@part
def _paeth(left: Any, above: Any, corner: Any) -> Any:
    """Return the one of three int64 neighbours that is closest to left + above - corner."""
    to_left, to_above = above - corner, left - corner
    to_corner = abs(to_left + to_above)
    to_left, to_above = abs(to_left), abs(to_above)
    other = above if to_above <= to_corner else corner
    return left if to_left <= min(to_above, to_corner) else other


@part
def _add_paeth(above: _Bytes, source: _Bytes, step: int, row: _Bytes) -> None:
    for channel in range(step):
        left = corner = np.int64(0)
        for x in range(channel, len(row), step):
            upper = np.int64(above[x])
            left = (source[x] + _paeth(left, upper, corner)) & 255
            row[x] = left
            corner = upper


@part
def _add_paeth_twice(above: _Bytes, sources: _Bytes, step: int, rows: _Bytes) -> None:
    """Undo two rows together, the second one pixel behind, so that their latencies overlap."""
    source, next_source, row, next_row = sources[0, 1:], sources[1, 1:], rows[0], rows[1]
    for channel in range(step):
        corner = np.int64(above[channel])
        left = (source[channel] + corner) & 255
        row[channel] = left
        next_left = next_corner = np.int64(0)
        for x in range(channel + step, len(row), step):
            next_left = (next_source[x - step] + _paeth(next_left, left, next_corner)) & 255
            next_row[x - step] = next_left
            next_corner = left
            upper = np.int64(above[x])
            left = (source[x] + _paeth(left, upper, corner)) & 255
            row[x] = left
            corner = upper
        last = len(row) - step + channel
        next_row[last] = next_source[last] + _paeth(next_left, left, next_corner)


@compiled("boolean(Array(uint8, 2, 'C', readonly=True), int64, uint8[:, ::1])")
def unfilter(rows: _Bytes, step: int, out: _Bytes) -> bool:
    """Undo the row filters of a PNG.

    A megabyte of Paeth, the slowest, takes 2.8 ms two rows at a time and 5.6 ms row by row; the
    others take 0.1 to 1.6. (Sixteen rows at a time, as SIMD lanes along the diagonal, took 3.2.)

    Args:
        rows: (H, 1 + n) uint8: the number of the filter, then n filtered bytes.
        step: Bytes from a pixel to the next, 1 to 4.
        out: (H, n) uint8, written.

    Returns:
        Whether all filters exist; if not, ``out`` is unfinished.
    """
    height = len(rows)
    above = np.zeros(out.shape[1], np.uint8)
    y = 0
    while y < height:
        kind, source, row = rows[y, 0], rows[y, 1:], out[y]
        if kind == 0:
            for x in range(len(row)):
                row[x] = source[x]
        elif kind == 1:
            _add_left(source, step, row)
        elif kind == 2:
            for x in range(len(row)):
                row[x] = source[x] + above[x]
        elif kind == 3:
            _add_average(above, source, step, row)
        elif kind != 4:
            return False
        elif y + 1 < height and rows[y + 1, 0] == 4:
            _add_paeth_twice(above, rows[y : y + 2], step, out[y : y + 2])
            y += 1
        else:
            _add_paeth(above, source, step, row)
        above = out[y]
        y += 1
    return True


# --- Deep greyscale


@compiled(
    "void(Array(uint16, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), u1[::1])"
)
def look_up(values: npt.NDArray[np.uint16], table: _Bytes, out: _Bytes) -> None:
    """Write ``table[values]``: (n,) uint16 through (65536,) uint8 into (n,) uint8."""
    for i in range(len(values)):
        out[i] = table[values[i]]


# --- Resampling. A plane is one channel of one row; planes of an image are numbered in a row.


@part
def _to_byte(total: Any) -> Any:
    return min(max(total >> WEIGHT_BITS, 0), 255)


@part
def _take_three(source: _Bytes, channels: int, number: int, planes: _Bytes) -> None:
    """Copy three planes: a row's three channels, or three rows of grey (the last again at the end).

    One pass over a row of colour takes half as long as three.
    """
    if channels == 3:
        row = source[number // 3]
        for x in range(planes.shape[1]):
            planes[0, x] = row[3 * x]
            planes[1, x] = row[3 * x + 1]
            planes[2, x] = row[3 * x + 2]
    else:
        for i in range(3):
            row = source[min(number + i, len(source) - 1)]
            for x in range(len(row)):
                planes[i, x] = row[x]


@part
def _narrow_three(
    planes: _Bytes, starts: npt.NDArray[np.int64], weights: npt.NDArray[np.int32], narrow: _Bytes
) -> None:
    """Resample three planes: together they take two thirds of the time they take one by one."""
    width = planes.shape[1]
    flat = planes.ravel()
    for x in range(len(starts)):
        first = np.uint64(starts[x])
        second, third = np.uint64(starts[x] + width), np.uint64(starts[x] + 2 * width)
        sum_0 = sum_1 = sum_2 = np.int32(_HALF)
        for i in range(np.uint64(weights.shape[1])):
            weight = weights[x, i]
            sum_0 = np.int32(sum_0 + np.int32(flat[first + i]) * weight)
            sum_1 = np.int32(sum_1 + np.int32(flat[second + i]) * weight)
            sum_2 = np.int32(sum_2 + np.int32(flat[third + i]) * weight)
        narrow[0, x] = _to_byte(sum_0)
        narrow[1, x] = _to_byte(sum_1)
        narrow[2, x] = _to_byte(sum_2)


@compiled(
    "void(Array(uint8, 2, 'C', readonly=True), int64, Array(int64, 1, 'C', readonly=True),"
    " Array(int32, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True),"
    " Array(int32, 2, 'C', readonly=True), uint8[:, ::1])"
)
def resample(  # noqa: PLR0917 (kernels take no keywords)
    source: _Bytes, channels: int,
    x_starts: npt.NDArray[np.int64], x_weights: npt.NDArray[np.int32],
    y_starts: npt.NDArray[np.int64], y_weights: npt.NDArray[np.int32],
    out: _Bytes,
) -> None:  # fmt: skip
    """Resample each row, round to 8 bits, then each column: Pillow's order and arithmetic.

    Only the narrowed planes of one output row's window are held, in a ring.

    Args:
        source: (H, W * channels) uint8.
        channels: 1 or 3.
        x_starts: (w,) first source column of each output column.
        x_weights: (w, taps) of the columns from there, times ``2**WEIGHT_BITS``.
        y_starts: (h,) first source row of each output row, never decreasing.
        y_weights: (h, taps) likewise.
        out: (h, w * channels) uint8, written.
    """
    new_width, num_taps = len(x_starts), y_weights.shape[1]
    ring_size = num_taps * channels + 2
    ring = np.empty((ring_size, new_width), np.uint8)
    planes = np.empty((3, source.shape[1] // channels), np.uint8)
    narrow = np.empty((3, new_width), np.uint8)
    sums = np.empty(new_width, np.int32)
    num_narrowed = 0
    for y in range(len(out)):
        first = y_starts[y] * channels
        while num_narrowed < first + num_taps * channels:
            _take_three(source, channels, num_narrowed, planes)
            _narrow_three(planes, x_starts, x_weights, narrow)
            for i in range(3):
                place = (num_narrowed + i) % ring_size
                for x in range(new_width):
                    ring[place, x] = narrow[i, x]
            num_narrowed += 3
        for channel in range(channels):
            for x in range(new_width):
                sums[x] = _HALF
            for i in range(num_taps):
                plane = ring[(first + i * channels + channel) % ring_size]
                weight = y_weights[y, i]
                for x in range(new_width):
                    sums[x] = np.int32(sums[x] + np.int32(plane[x]) * weight)
            for x in range(new_width):
                out[y, x * channels + channel] = _to_byte(sums[x])
