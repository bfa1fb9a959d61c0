"""A training step of heads on the CPU, compiled by Numba. Imported late, by ``compiled_stack``.

A step is forward, loss, backward and optimizer, head after head. The optimizer moves a layer as
soon as its gradient is there, while both are in the core's own cache: of the 20 MB that Adam moves
for a head of 0.7 M parameters, the gradient's 6 never leave it. Products are calls of SciPy's
OpenBLAS: 75 GFLOP/s on a Zen 3 core at these shapes, where torch's MKL reaches 57.

A head is the flat arrays of ``stack.HeadStack``: parameters in the order of its state dict (of each
layer: batch norm's weight and bias, then the linear layer's), running statistics likewise (of each
layer: mean, variance). ``widths`` is D, the hidden widths, C. The formulas are those of ``stack``
and ``loss``. Rows (B, D) come as they are; what layers put out is turned, (width, B), so that a
batch norm works through one unit after the other.

The first layer is nearly all of a head. Its units are cut into two halves, which one thread works
through in turn or two at the same time; the sums over both are made per half either way, so the
result is the same to the last bit.

Numba shapes the code. One number of float64 makes a whole loop float64, so all are cast. LLVM gives
up on a loop that writes to several arrays, as each may overlap the others: a row is worked through
in several short loops in place of a long one.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache import head_space, loss_kernels, optimizer_kernels
from featcache.compiling import compiled, part, summing
from featcache.head_space import (
    TILE_ROWS,
    at_params,
    half_of_units,
    matrix,
    of_half,
    of_rows,
    outputs,
)
from featcache.loss_kernels import binary_cross_entropy, cross_entropy
from featcache.optimizer_kernels import move

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

WHOLE, BEGIN, UNITS, MIDDLE, WEIGHTS, END = range(6)  # ``phase`` of ``step``

_ONE = np.float32(1)
_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = np.float32(1e-5), np.float32(0.1)


# --- Loops


@summing
def _sum(values: _Floats) -> np.float32:
    total = np.float32(0)
    for j in range(len(values)):
        total += values[j]
    return total


@summing
def _sum_products(left: _Floats, right: _Floats) -> np.float32:
    total = np.float32(0)
    for j in range(len(left)):
        total += left[j] * right[j]
    return total


@part
def _add_products(left: _Floats, right: _Floats, sums: _Floats) -> None:
    """Add the column sums of products; four rows at a time, or the sums' traffic would be all."""
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
def _scale_and_shift(values: _Floats, scale: np.float32, shift: np.float32, out: _Floats) -> None:
    for j in range(len(values)):
        out[j] = values[j] * scale + shift


@part
def _mask_units(values: _Floats, mask: _Floats) -> None:
    """Multiply (W, B) by a mask (B, W), if there is one."""
    if mask.size:
        for row in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                values[j, row] *= mask[row, j]


@part
def _track(running: _Floats, j: int, current: np.float32) -> None:
    running[j] += _BATCH_NORM_MOMENTUM * (current - running[j])


# --- Forward


@part
def _normalise_rows(rows: _Floats, normed: _Floats, mean: _Floats, variance: _Floats) -> None:
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
    _add_products(normed, normed, variance)
    for j in range(wide):
        inverse[j] = _ONE / np.sqrt(variance[j] * share + _BATCH_NORM_EPS)
    for row in range(num_rows):
        for j in range(wide):
            normed[row, j] *= inverse[j]
    correction = np.float32(1 / (num_rows - 1))
    for j in range(wide):
        variance[j] *= correction


@part
def _begin(
    widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Track the rows' statistics and put the rows through the first batch norm."""
    normed, shown, mean, variance = of_rows(widths, num_rows, space)
    wide = widths[0]
    for j in range(wide):
        _track(stats, j, mean[j])
        _track(stats, wide + j, variance[j])
    scale, shift = params[:wide], params[wide : 2 * wide]
    for row in range(num_rows):
        for j in range(wide):
            shown[row, j] = normed[row, j] * scale[j] + shift[j]
    if len(widths) == 2 and mask.size:
        for row in range(num_rows):
            for j in range(wide):
                shown[row, j] *= mask[row, j]


@part
def _activate(
    layer: int, lowest: int, end: int, widths: _Ints, params: _Floats, stats: _Floats,
    num_rows: int, space: _Floats,
) -> None:  # fmt: skip
    """Add biases to some units of a layer and, but for logits, put them through ReLU and norm."""
    out, normed, _, inverse = outputs(widths, num_rows, layer, space)
    narrow = widths[layer + 1]
    bias = params[at_params(widths, layer + 1) - narrow :]
    at_stats = 2 * widths[: layer + 1].sum()
    share = _ONE / np.float32(num_rows)
    correction = np.float32(num_rows / (num_rows - 1))
    for unit in range(lowest, end):
        values, centred = out[unit], normed[unit]
        if layer == len(widths) - 2:
            _scale_and_shift(values, _ONE, bias[unit], values)
            continue
        for row in range(num_rows):
            values[row] = max(values[row] + bias[unit], np.float32(0))
        mean = _sum(values) * share
        _scale_and_shift(values, _ONE, -mean, centred)
        variance = _sum_products(centred, centred) * share
        inverse[unit] = _ONE / np.sqrt(variance + _BATCH_NORM_EPS)
        _scale_and_shift(centred, inverse[unit], np.float32(0), centred)
        _track(stats, at_stats + unit, mean)
        _track(stats, at_stats + narrow + unit, variance * correction)


@part
def _forward_units(
    half: int, widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, space: _Floats
) -> None:
    """Run the rows through half of the first layer."""
    lowest, end = half_of_units(widths, half)
    if lowest == end:
        return
    wide = widths[0]
    shown, out = of_rows(widths, num_rows, space)[1], outputs(widths, num_rows, 0, space)[0]
    weights = matrix(params, 2 * wide, widths[1], wide)
    np.dot(weights[lowest:end], shown.T, out[lowest:end])
    _activate(0, lowest, end, widths, params, stats, num_rows, space)


@part
def _show(
    layer: int, widths: _Ints, params: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> _Floats:
    """Return what a layer but the first sees, (width, B): batch norm, then dropout."""
    wide, at = widths[layer], at_params(widths, layer)
    normed = outputs(widths, num_rows, layer - 1, space)[1]
    shown = np.empty((wide, num_rows), np.float32)
    for unit in range(wide):
        _scale_and_shift(normed[unit], params[at + unit], params[at + wide + unit], shown[unit])
    if layer == len(widths) - 2:
        _mask_units(shown, mask)
    return shown


@part
def _forward_rest(
    widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Run all layers but the first."""
    for layer in range(1, len(widths) - 1):
        wide, narrow = widths[layer], widths[layer + 1]
        weights = matrix(params, at_params(widths, layer) + 2 * wide, narrow, wide)
        shown = _show(layer, widths, params, num_rows, mask, space)
        np.dot(weights, shown, outputs(widths, num_rows, layer, space)[0])
        _activate(layer, 0, narrow, widths, params, stats, num_rows, space)


# --- Backward


@part
def _move_weights(
    kind: int, at: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats, shown: _Floats,
) -> None:  # fmt: skip
    """Move the weights (H, W) that begin at ``at``, by gradients (H, B) and inputs (W, B)."""
    wide = shown.shape[0]
    tile = np.empty(min(TILE_ROWS, len(grad)) * wide, np.float32)
    for start in range(0, len(grad), TILE_ROWS):
        num = min(TILE_ROWS, len(grad) - start)
        np.dot(grad[start : start + num], shown.T, matrix(tile, 0, num, wide))
        begin, end = at + start * wide, at + (start + num) * wide
        move(kind, params[begin:end], tile[: num * wide], first[begin:end], second[begin:end],
              settings)  # fmt: skip


@part
def _move_biases(
    kind: int, at: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats,
) -> _Floats:  # fmt: skip
    """Move the biases (H,) that begin at ``at``; return the row sums of the gradient (H, B)."""
    sums, moved_by = np.empty(len(grad), np.float32), np.empty(len(grad), np.float32)
    for unit in range(len(grad)):
        sums[unit] = moved_by[unit] = _sum(grad[unit])
    end = at + len(grad)
    move(kind, params[at:end], moved_by, first[at:end], second[at:end], settings)
    return sums


@part
def _backward_rest(
    kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, mask: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Move all layers but the first; set the gradient of what that puts out."""
    share = _ONE / np.float32(num_rows)
    for layer in range(len(widths) - 2, 0, -1):
        wide, narrow, at = widths[layer], widths[layer + 1], at_params(widths, layer)
        grad = outputs(widths, num_rows, layer, space)[2]
        out, normed, below, inverse = outputs(widths, num_rows, layer - 1, space)
        shown = _show(layer, widths, params, num_rows, mask, space)
        np.dot(matrix(params, at + 2 * wide, narrow, wide).T, grad, below)
        if layer == len(widths) - 2:
            _mask_units(below, mask)
        at_bias = at + 2 * wide + narrow * wide
        _move_biases(kind, at_bias, params, first, second, settings, grad)
        _move_weights(kind, at + 2 * wide, params, first, second, settings, grad, shown)
        norm_grads = np.empty(2 * wide, np.float32)
        for unit in range(wide):
            values, units = below[unit], normed[unit]
            by_scale, by_shift = _sum_products(values, units), _sum(values)
            norm_grads[unit], norm_grads[wide + unit] = by_scale, by_shift
            factor = params[at + unit] * inverse[unit]
            for row in range(num_rows):
                value = factor * (values[row] - share * (by_shift + units[row] * by_scale))
                values[row] = value if out[unit, row] > 0 else np.float32(0)
        end = at + 2 * wide
        move(kind, params[at:end], norm_grads, first[at:end], second[at:end], settings)


@part
def _move_first_weights(
    half: int, kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, mask: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Move half of the first layer; set the half's gradients of the batch norm before it.

    See ``stack``'s docstring. A linear head has dropout between the two: what multiplies beta is
    then not the sums of ``grad`` but its products with the mask.
    """
    lowest, end = half_of_units(widths, half)
    wide, narrow = widths[0], widths[1]
    rows, grad = of_rows(widths, num_rows, space)[0], outputs(widths, num_rows, 0, space)[2]
    tile, scale_grad, shift_grad = of_half(widths, num_rows, half, space)
    scale_grad[:], shift_grad[:] = np.float32(0), np.float32(0)
    if lowest == end:
        return
    has_mask = len(widths) == 2 and mask.size > 0
    if has_mask:
        rows = rows * mask
    scale, shift = params[:wide], params[wide : 2 * wide]
    at_bias = 2 * wide + narrow * wide + lowest
    sums = _move_biases(kind, at_bias, params, first, second, settings, grad[lowest:end])
    for start in range(lowest, end, TILE_ROWS):
        num = min(TILE_ROWS, end - start)
        products = matrix(tile, 0, num, wide)
        np.dot(grad[start : start + num], rows, products)
        weights = matrix(params, 2 * wide + start * wide, num, wide)
        _add_products(weights, products, scale_grad)
        totals = sums[start - lowest :][:num]
        if has_mask:
            masked = np.dot(grad[start : start + num], mask)
            _add_products(weights, masked, shift_grad)
            for row in range(num):
                for j in range(wide):
                    products[row, j] = products[row, j] * scale[j] + masked[row, j] * shift[j]
        else:
            shift_grad += np.dot(totals, weights)
            for row in range(num):
                for j in range(wide):
                    products[row, j] = products[row, j] * scale[j] + totals[row] * shift[j]
        for row in range(num):
            at = 2 * wide + (start + row) * wide
            move(kind, weights[row], products[row], first[at : at + wide], second[at : at + wide],
                  settings)  # fmt: skip


@part
def _end(
    kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, space: _Floats,
) -> None:  # fmt: skip
    """Move the first batch norm by the gradients of both halves."""
    wide = widths[0]
    norm_grads = np.empty(2 * wide, np.float32)
    for place in range(2):
        one = of_half(widths, num_rows, 0, space)[1 + place]
        other = of_half(widths, num_rows, 1, space)[1 + place]
        for j in range(wide):
            norm_grads[place * wide + j] = one[j] + other[j]
    move(kind, params[: 2 * wide], norm_grads, first[: 2 * wide], second[: 2 * wide], settings)


# --- The step


@compiled(
    "void(int64, int64, int64, int64[::1], float32[:, ::1], float32[:, ::1], float32[:, ::1],"
    "float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[::1], float32[:, ::1], float32[::1],"
    "float32[:, ::1], float32[::1], float32[:, :, ::1], float32[::1], float32[::1])",
    head_space, loss_kernels, optimizer_kernels,
)  # fmt: skip
def step(
    phase: int, half: int, kind: int, widths: _Ints, params: _Floats, stats: _Floats,
    first: _Floats, second: _Floats, settings: _Floats, rows: _Floats, classes: _Ints,
    labels: _Floats, row_weights: _Floats, class_weights: _Floats, smoothing: _Floats,
    masks: _Floats, space: _Floats, losses: _Floats,
) -> None:  # fmt: skip
    """Move K heads against their losses on a batch.

    Args:
        phase: ``WHOLE``; or of a step of one head its phases in order, ``UNITS`` and ``WEIGHTS``
            of both halves each, which may run at the same time.
        half: 0 or 1, of those two.
        kind: See ``optimizer_kernels``.
        widths: D, the hidden widths, C.
        params: (K, P), written.
        stats: (K, S), written: they move a tenth of the way.
        first: (K, P) moments, written; of SGD the momentum.
        second: (K, P) moments, written; not looked at with SGD.
        settings: (K, 4): learning rate, weight decay and Adam's corrections, 1 - beta ** steps.
        rows: (B, D), two or more.
        classes: (B,) from 0 to C - 1; not looked at where there are labels.
        labels: (B, C) of 0, 1 and NaN, or (0, 0): one class a row.
        row_weights: (B,), or (0,): all count alike.
        class_weights: (K, C).
        smoothing: (K,).
        masks: (K, B, last width) to multiply the last layer's input by, or (0, 0, 0): no dropout.
        space: Of ``space_size``, written; from phase to phase the same.
        losses: (K,), written.
    """
    num_rows, last = len(rows), len(widths) - 2
    if phase in (WHOLE, BEGIN):
        normed, _, mean, variance = of_rows(widths, num_rows, space)
        _normalise_rows(rows, normed, mean, variance)
    mask = np.empty((0, 0), np.float32)
    for head in range(len(params)):
        of_head, moments, squares = params[head], first[head], second[head]
        if masks.size:
            mask = masks[head]
        if phase in (WHOLE, BEGIN):
            _begin(widths, of_head, stats[head], num_rows, mask, space)
        for place in range(2):
            if phase == WHOLE or (phase == UNITS and half == place):
                _forward_units(place, widths, of_head, stats[head], num_rows, space)
        if phase in (WHOLE, MIDDLE):
            _forward_rest(widths, of_head, stats[head], num_rows, mask, space)
            logits, _, grad, _ = outputs(widths, num_rows, last, space)
            weights, smooth = class_weights[head], smoothing[head]
            if labels.size:
                loss = binary_cross_entropy(logits, labels, row_weights, weights, smooth, grad)
            else:
                loss = cross_entropy(logits, classes, row_weights, weights, smooth, grad)
            losses[head] = loss
            _backward_rest(
                kind, widths, of_head, moments, squares, settings[head], num_rows, mask, space
            )
        for place in range(2):
            if phase == WHOLE or (phase == WEIGHTS and half == place):
                _move_first_weights(place, kind, widths, of_head, moments, squares, settings[head],
                                    num_rows, mask, space)  # fmt: skip
        if phase in (WHOLE, END):
            _end(kind, widths, of_head, moments, squares, settings[head], num_rows, space)
