"""Gradients of a layer's weights, used as soon as they are there: for ``head_kernels``.

Of a head of 0.7 M parameters Adam reads and writes 18 MB a step, and a gradient would be 6 more. It
never leaves the registers: a block of it is summed over the batch, gives its share to the gradients
of the batch norm before the layer, and moves the weights.

Reads, writes: arrays. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import intrinsic, part
from featcache.heads.compiled.optimizer_kernels import ADAM, NUM_MOVED, SGD, pace_of, write_move
from featcache.heads.compiled.products import DEPTH, multiply
from featcache.heads.compiled.vectors import INDEX, NOTHING, PANEL, UNITS, Code

_Floats = npt.NDArray[np.float32]


def _block(kind: int, units: int, *, partial: bool) -> Any:
    """Return a function that moves a block of weights."""

    @intrinsic
    def move_block(  # noqa: PLR0917
        _: Any, grad: Any, rows: Any, sums: Any, scale: Any, shift: Any, norm_grads: Any,
        weights: Any, first: Any, second: Any, sums_so_far: Any, pace: Any, unit: Any, column: Any,
        row_before: Any, column_before: Any, start: Any,
    ) -> Any:  # fmt: skip
        """Move a block whose sums over the rows before ``start`` are in ``sums_so_far``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = Code(context, builder)
            grad, rows, sums, scale, shift, norms, *moved, done = (
                code.array(signature, arguments, i) for i in range(10)
            )
            pace, unit, column, row_before, column_before, start = arguments[10:]
            none, one = code.whole(0), code.whole(1)
            if partial:
                code.keep_within(builder.sub(rows.shape[1], column))
            products = code.add_products(
                grad.corner(unit, start), rows.corner(start, column),
                builder.sub(rows.shape[0], start),
                [
                    code.load(done.at(builder.add(row_before, code.whole(i)), column_before))
                    for i in range(units)
                ],
            )  # fmt: skip
            numbers = [code.spread(builder.extract_value(pace, i)) for i in range(4)]
            scales, shifts = code.load(scale.at(column)), code.load(shift.at(column))
            by_scale, by_shift = (code.load(norms.at(row, column)) for row in (none, one))
            fma = code.multiply_add
            for number, product in enumerate(products):
                row = builder.add(unit, code.whole(number))
                of_unit = code.read(sums.at(row))
                places = [array.at(row, column) for array in moved[: NUM_MOVED[kind]]]
                before = [code.load(place) for place in places]
                by_scale = _each(fma, before[0], product, by_scale)
                by_shift = _each(fma, (of_unit,) * 2, before[0], by_shift)
                shifted = tuple(builder.fmul(of_unit, vector) for vector in shifts)
                slope = _each(fma, product, scales, shifted)
                after = write_move(code, kind, numbers, slope, before)
                for panel, place in zip(after, places, strict=True):
                    code.store(panel, place)
            code.store(by_scale, norms.at(none, column))
            code.store(by_shift, norms.at(one, column))
            return context.get_dummy_value()

        kinds = grad, rows, sums, scale, shift, norm_grads, weights, first, second, sums_so_far
        return NOTHING(*kinds, pace, *[INDEX] * 5), generate

    return move_block


def _each(function: Any, *pairs: Any) -> Any:
    return tuple(function(*vectors) for vectors in zip(*pairs, strict=True))


_adam, _sgd = _block(ADAM, UNITS, partial=False), _block(SGD, UNITS, partial=False)
_adam_row, _sgd_row = _block(ADAM, 1, partial=True), _block(SGD, 1, partial=True)


@part
def move_weights(  # noqa: PLR0917
    kind: int, grad: _Floats, rows: _Floats, sums: _Floats, scale: _Floats, shift: _Floats,
    norm_grads: _Floats, weights: _Floats, first: _Floats, second: _Floats, settings: _Floats,
) -> None:  # fmt: skip
    """Move weights (n, D) of a layer whose input is rows (B, D) times a scale (D,) plus a shift.

    Args:
        kind: Of the optimizer.
        grad: (n, B) of what the layer puts out.
        rows: (B, D).
        sums: (n,) of ``grad`` over the rows.
        scale: (D,).
        shift: (D,).
        norm_grads: (2, D) that the gradients of scale and shift are added to.
        weights: (n, D), written.
        first: (n, D) moments, written.
        second: (n, D) moments, written.
        settings: (4,) of the head.
    """
    num, wide = weights.shape
    pace, units, columns = pace_of(kind, settings), num - num % UNITS, wide - wide % PANEL
    start = (len(rows) - 1) // DEPTH * DEPTH  # of a large batch the last rows are summed here
    so_far = np.zeros((num, wide) if start else (UNITS, PANEL), np.float32)
    if start:
        multiply(grad, rows, start, so_far)
    for unit in range(0, units, UNITS):
        for column in range(0, columns, PANEL):
            at_row, at_column = (unit, column) if start else (0, 0)
            if kind == SGD:
                _sgd(grad, rows, sums, scale, shift, norm_grads, weights, first, second, so_far,
                     pace, unit, column, at_row, at_column, start)  # fmt: skip
            else:
                _adam(grad, rows, sums, scale, shift, norm_grads, weights, first, second, so_far,
                      pace, unit, column, at_row, at_column, start)  # fmt: skip
    for unit in range(num):
        for column in range(columns if unit < units else 0, wide, PANEL):
            at_row, at_column = (unit, column) if start else (0, 0)
            if kind == SGD:
                _sgd_row(grad, rows, sums, scale, shift, norm_grads, weights, first, second, so_far,
                         pace, unit, column, at_row, at_column, start)  # fmt: skip
            else:
                _adam_row(grad, rows, sums, scale, shift, norm_grads, weights, first, second,
                          so_far, pace, unit, column, at_row, at_column, start)  # fmt: skip
