"""Products of matrices that are small on one side, as those of a batch are: for ``head_kernels``.

Sums are kept in registers until they are whole. SciPy's OpenBLAS, which rearranges both matrices
first, reached 100 GFLOP/s on a Xeon core (Granite Rapids) with 32 rows a batch; this 160 to 210,
and as much as OpenBLAS with 256 rows.

Reads: arrays. Writes: the product. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import part
from featcache.vectors import INDEX, NOTHING, PANEL, UNITS, Code, intrinsic

_Floats = npt.NDArray[np.float32]

_DEPTH = 256
"""Terms that are summed at a time: of the right matrix, so many rows of a panel lie in the first
cache while all rows of the left one are multiplied with them."""


def _block(units: int, *, partial: bool) -> Any:
    """Return a function that adds to a block of a product."""

    @intrinsic
    def add_block(  # noqa: PLR0917
        _: Any, left: Any, right: Any, out: Any, row: Any, column: Any, start: Any, end: Any
    ) -> Any:
        """Add the products of columns start to end of ``left`` and such rows of ``right``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = Code(context, builder)
            a, b, c = (code.array(signature, arguments, i) for i in range(3))
            row, column, start, end = arguments[3:]
            if partial:
                code.keep_within(builder.sub(c.shape[1], column))
            places = [c.at(builder.add(row, code.whole(unit)), column) for unit in range(units)]
            sums = code.add_products(
                a.corner(row, start), b.corner(start, column), builder.sub(end, start),
                [code.load(place) for place in places],
            )  # fmt: skip
            for panel, place in zip(sums, places, strict=True):
                code.store(panel, place)
            return context.get_dummy_value()

        return NOTHING(left, right, out, INDEX, INDEX, INDEX, INDEX), generate

    return add_block


_full, _partial = _block(UNITS, partial=False), _block(UNITS, partial=True)
_full_row, _partial_row = _block(1, partial=False), _block(1, partial=True)


@part
def multiply(left: _Floats, right: _Floats, out: _Floats) -> None:
    """Set ``out`` (n, m) to left (n, k) times right (k, m); those two have whole rows in order."""
    num_rows, num_columns = out.shape
    rows, columns = num_rows - num_rows % UNITS, num_columns - num_columns % PANEL
    out[:] = np.float32(0)
    for start in range(0, left.shape[1], _DEPTH):
        end = min(start + _DEPTH, left.shape[1])
        for column in range(0, columns, PANEL):
            for row in range(0, rows, UNITS):
                _full(left, right, out, row, column, start, end)
            for row in range(rows, num_rows):
                _full_row(left, right, out, row, column, start, end)
        if columns < num_columns:
            for row in range(0, rows, UNITS):
                _partial(left, right, out, row, columns, start, end)
            for row in range(rows, num_rows):
                _partial_row(left, right, out, row, columns, start, end)
