"""Products of matrices that are small on one side, as those of a batch are: for ``head_kernels``.

Sums are kept in registers while terms are added. SciPy's OpenBLAS, which rearranges both matrices
first, reached 100 GFLOP/s on a Xeon core (Granite Rapids) with 32 rows a batch and 170 with 4,096;
this 170 and 150.

Reads: arrays. Writes: the product. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import intrinsic, part
from featcache.heads.compiled.vectors import INDEX, NOTHING, PANEL, UNITS, Code

_Floats = npt.NDArray[np.float32]

DEPTH = 256
"""Terms that are summed at a time: of the right matrix, so many rows of a panel lie in the first
cache while all rows of the left one are multiplied with them."""


def _block(units: int, *, partial: bool) -> Any:
    """Return a function that adds to a block of a product."""

    @intrinsic
    def add_block(  # noqa: PLR0917
        _: Any, left: Any, right: Any, out: Any, row: Any, column: Any, start: Any, end: Any,
        right_row: Any, right_column: Any,
    ) -> Any:  # fmt: skip
        """Add products of columns start to end of ``left`` and as many rows of ``right``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = Code(context, builder)
            a, b, c = (code.array(signature, arguments, i) for i in range(3))
            row, column, start, end, right_row, right_column = arguments[3:]
            if partial:
                code.keep_within(builder.sub(c.shape[1], column))
            places = [c.at(builder.add(row, code.whole(unit)), column) for unit in range(units)]
            sums = code.add_products(
                a.corner(row, start), b.corner(right_row, right_column), builder.sub(end, start),
                [code.load(place) for place in places],
            )  # fmt: skip
            for panel, place in zip(sums, places, strict=True):
                code.store(panel, place)
            return context.get_dummy_value()

        return NOTHING(left, right, out, *[INDEX] * 6), generate

    return add_block


def _copying(*, partial: bool) -> Any:
    """Return a function that copies a panel of a row."""

    @intrinsic
    def copy(_: Any, values: Any, row: Any, column: Any, panel: Any, to: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = Code(context, builder)
            source, target = (code.array(signature, arguments, i) for i in (0, 3))
            if partial:
                code.keep_within(builder.sub(source.shape[1], arguments[2]))
            vectors = code.load(source.at(arguments[1], arguments[2]))
            code.store(vectors, target.at(arguments[4], code.whole(0)))
            return context.get_dummy_value()

        return NOTHING(values, INDEX, INDEX, panel, INDEX), generate

    return copy


_copy, _copy_part = _copying(partial=False), _copying(partial=True)
_full, _partial = _block(UNITS, partial=False), _block(UNITS, partial=True)
_full_row, _partial_row = _block(1, partial=False), _block(1, partial=True)


@part
def multiply(left: _Floats, right: _Floats, depth: int, out: _Floats) -> None:
    """Set ``out`` (n, m) to left (n, k) times right (k, m), of which ``depth`` terms are summed.

    Args:
        left: Read in any order.
        right: Whole rows in order. If it is wider than a panel, panels are copied: down a column
            each row is another page, and at powers of two all fall on the same lines of a cache.
        depth: Up to k.
        out: Written.
    """
    num_rows, num_columns = out.shape
    is_copied = num_columns > PANEL and num_rows > UNITS
    panel = np.empty((DEPTH if is_copied else 1, PANEL), np.float32)
    out[:] = np.float32(0)
    for start in range(0, depth, DEPTH):
        end = min(start + DEPTH, depth)
        for column in range(0, num_columns, PANEL):
            if not is_copied:
                _multiply_panel(left, right, out, column, start, end, start, column)
                continue
            for row in range(start, end):
                if column + PANEL <= num_columns:
                    _copy(right, row, column, panel, row - start)
                else:
                    _copy_part(right, row, column, panel, row - start)
            _multiply_panel(left, panel, out, column, start, end, 0, 0)


@part
def _multiply_panel(  # noqa: PLR0917
    left: _Floats, right: _Floats, out: _Floats, column: int, start: int, end: int, at_row: int,
    at_column: int,
) -> None:  # fmt: skip
    num_rows, is_whole = out.shape[0], column + PANEL <= out.shape[1]
    rows = num_rows - num_rows % UNITS
    for row in range(0, rows, UNITS):
        if is_whole:
            _full(left, right, out, row, column, start, end, at_row, at_column)
        else:
            _partial(left, right, out, row, column, start, end, at_row, at_column)
    for row in range(rows, num_rows):
        if is_whole:
            _full_row(left, right, out, row, column, start, end, at_row, at_column)
        else:
            _partial_row(left, right, out, row, column, start, end, at_row, at_column)
