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

A step's work is cut into pieces, the same for every number of threads: each half of the first
layer's forward pass, then each tile of the weights of all layers. What is summed over pieces is
summed in their order, so the result is the same to the last bit, whoever takes which.

Numba shapes the code. One number of float64 makes a whole loop float64, so all are cast. LLVM gives
up on a loop that writes to several arrays, as each may overlap the others: a row is worked through
in several short loops in place of a long one.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache import atomics, head_space, loops, loss_kernels, optimizer_kernels, tickets
from featcache.compiling import compiled, part
from featcache.head_space import (
    TILE_ROWS,
    at_layer,
    at_params,
    count_tiles,
    half_of_units,
    matrix,
    norm_grads_of,
    of_rows,
    of_thread,
    outputs,
    tiles_of,
)
from featcache.loops import (
    add_products,
    mask_units,
    scale_and_shift,
    sum_of,
    sum_of_products,
)
from featcache.loss_kernels import binary_cross_entropy, cross_entropy
from featcache.optimizer_kernels import move
from featcache.tickets import await_all, await_piece, end_piece, open_pieces, take_piece

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

LEADER, HELPER = 0, 1  # ``thread`` of ``step``
FORWARD_PIECES = 2

_ONE = np.float32(1)
_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = np.float32(1e-5), np.float32(0.1)


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
    add_products(normed, normed, variance)
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
    out, normed, _, _, inverse = outputs(widths, num_rows, layer, space)
    narrow = widths[layer + 1]
    bias = params[at_params(widths, layer + 1) - narrow :]
    at_stats = 2 * widths[: layer + 1].sum()
    share = _ONE / np.float32(num_rows)
    correction = np.float32(num_rows / (num_rows - 1))
    for unit in range(lowest, end):
        values, centred = out[unit], normed[unit]
        if layer == len(widths) - 2:
            scale_and_shift(values, _ONE, bias[unit], values)
            continue
        for row in range(num_rows):
            values[row] = max(values[row] + bias[unit], np.float32(0))
        mean = sum_of(values) * share
        scale_and_shift(values, _ONE, -mean, centred)
        variance = sum_of_products(centred, centred) * share
        inverse[unit] = _ONE / np.sqrt(variance + _BATCH_NORM_EPS)
        scale_and_shift(centred, inverse[unit], np.float32(0), centred)
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
def _forward_rest(
    widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Run all layers but the first."""
    for layer in range(1, len(widths) - 1):
        wide, narrow, at = widths[layer], widths[layer + 1], at_params(widths, layer)
        _, normed, shown, _, _ = outputs(widths, num_rows, layer - 1, space)
        for unit in range(wide):
            scale_and_shift(normed[unit], params[at + unit], params[at + wide + unit], shown[unit])
        if layer == len(widths) - 2:
            mask_units(shown, mask)
        weights = matrix(params, at + 2 * wide, narrow, wide)
        np.dot(weights, shown, outputs(widths, num_rows, layer, space)[0])
        _activate(layer, 0, narrow, widths, params, stats, num_rows, space)


# --- Backward


@part
def _move_biases(
    kind: int, at: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats,
) -> _Floats:  # fmt: skip
    """Move the biases (H,) that begin at ``at``; return the row sums of the gradient (H, B)."""
    sums, moved_by = np.empty(len(grad), np.float32), np.empty(len(grad), np.float32)
    for unit in range(len(grad)):
        sums[unit] = moved_by[unit] = sum_of(grad[unit])
    end = at + len(grad)
    move(kind, params[at:end], moved_by, first[at:end], second[at:end], settings)
    return sums


@part
def _backward_rest(
    kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, mask: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Set the gradients of what all layers but the last put out; move the batch norms between."""
    share = _ONE / np.float32(num_rows)
    for layer in range(len(widths) - 2, 0, -1):
        wide, narrow, at = widths[layer], widths[layer + 1], at_params(widths, layer)
        grad = outputs(widths, num_rows, layer, space)[3]
        out, normed, _, below, inverse = outputs(widths, num_rows, layer - 1, space)
        np.dot(matrix(params, at + 2 * wide, narrow, wide).T, grad, below)
        if layer == len(widths) - 2:
            mask_units(below, mask)
        norm_grads = np.empty(2 * wide, np.float32)
        for unit in range(wide):
            values, units = below[unit], normed[unit]
            by_scale, by_shift = sum_of_products(values, units), sum_of(values)
            norm_grads[unit], norm_grads[wide + unit] = by_scale, by_shift
            factor = params[at + unit] * inverse[unit]
            for row in range(num_rows):
                value = factor * (values[row] - share * (by_shift + units[row] * by_scale))
                values[row] = value if out[unit, row] > 0 else np.float32(0)
        end = at + 2 * wide
        move(kind, params[at:end], norm_grads, first[at:end], second[at:end], settings)


@part
def _move_tile(
    tile: int, thread: int, kind: int, widths: _Ints, params: _Floats, first: _Floats,
    second: _Floats, settings: _Floats, num_rows: int, mask: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Move a tile of some layer's weights and its biases."""
    layer, place = 0, tile
    while place >= tiles_of(widths, layer):
        place -= tiles_of(widths, layer)
        layer += 1
    wide, narrow, at = widths[layer], widths[layer + 1], at_params(widths, layer)
    start = place * TILE_ROWS
    num = min(TILE_ROWS, narrow - start)
    grad = outputs(widths, num_rows, layer, space)[3][start : start + num]
    at_bias = at + 2 * wide + narrow * wide + start
    sums = _move_biases(kind, at_bias, params, first, second, settings, grad)
    if layer == 0:
        products = matrix(of_thread(widths, num_rows, thread, space), 0, num, wide)
        _grade_first(place, start, widths, params, grad, sums, num_rows, mask, products, space)
    else:
        products = np.empty((num, wide), np.float32)
        np.dot(grad, outputs(widths, num_rows, layer - 1, space)[2].T, products)
    for row in range(num):
        begin = at + 2 * wide + (start + row) * wide
        end = begin + wide
        move(kind, params[begin:end], products[row], first[begin:end], second[begin:end], settings)


@part
def _grade_first(
    tile: int, start: int, widths: _Ints, params: _Floats, grad: _Floats, sums: _Floats,
    num_rows: int, mask: _Floats, products: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Set the gradients of a tile of the first layer, and its share of the batch norm's before it.

    See ``stack``'s docstring. A linear head has dropout between the two: what multiplies beta is
    then not the sums of ``grad`` but its products with the mask.
    """
    wide, num = widths[0], len(grad)
    rows = of_rows(widths, num_rows, space)[0]
    norm_grads = norm_grads_of(widths, num_rows, tile, space)
    norm_grads[:] = np.float32(0)
    scale, shift = params[:wide], params[wide : 2 * wide]
    weights = matrix(params, 2 * wide + start * wide, num, wide)
    if len(widths) == 2 and mask.size:
        np.dot(grad, rows * mask, products)
        masked = np.dot(grad, mask)
        add_products(weights, products, norm_grads[0])
        add_products(weights, masked, norm_grads[1])
        for row in range(num):
            for j in range(wide):
                products[row, j] = products[row, j] * scale[j] + masked[row, j] * shift[j]
        return
    np.dot(grad, rows, products)
    add_products(weights, products, norm_grads[0])
    np.dot(sums, weights, norm_grads[1])
    for row in range(num):
        for j in range(wide):
            products[row, j] = products[row, j] * scale[j] + sums[row] * shift[j]


@part
def _end(
    kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, space: _Floats,
) -> None:  # fmt: skip
    """Move the first batch norm by the gradients of all tiles."""
    wide = widths[0]
    norm_grads = np.zeros(2 * wide, np.float32)
    for tile in range(tiles_of(widths, 0)):
        of_tile = norm_grads_of(widths, num_rows, tile, space).reshape(2 * wide)
        for j in range(2 * wide):
            norm_grads[j] += of_tile[j]
    move(kind, params[: 2 * wide], norm_grads, first[: 2 * wide], second[: 2 * wide], settings)


# --- The step


@compiled("int64(int64[::1])", head_space)
def count_pieces(widths: _Ints) -> int:
    """Return in how many pieces the work of a head's step is cut."""
    return FORWARD_PIECES + count_tiles(widths)


@compiled("int64(int64[::1], int64)", head_space)
def space_size(widths: _Ints, num_rows: int) -> int:
    """Return how many float32 a step of ``num_rows`` rows works in."""
    return at_layer(widths, num_rows, len(widths) - 1)


@part
def _work(
    end: int, thread: int, state: _Ints, kind: int, widths: _Ints, params: _Floats,
    stats: _Floats, first: _Floats, second: _Floats, settings: _Floats, num_rows: int,
    masks: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Do pieces before ``end`` until none is left; the helper waits for more to be opened."""
    per_head, mask = count_pieces(widths), np.empty((0, 0), np.float32)
    while True:
        piece = take_piece(state, end) if thread == LEADER else await_piece(state, end)
        if piece < 0:
            return
        head, place = piece // per_head, piece % per_head
        if place < FORWARD_PIECES:
            _forward_units(place, widths, params[head], stats[head], num_rows, space)
        else:
            if masks.size:
                mask = masks[head]
            _move_tile(
                place - FORWARD_PIECES, thread, kind, widths, params[head], first[head],
                second[head], settings[head], num_rows, mask, space,
            )  # fmt: skip
        end_piece(state)


@part
def _share(
    count: int, state: _Ints, kind: int, widths: _Ints, params: _Floats, stats: _Floats,
    first: _Floats, second: _Floats, settings: _Floats, num_rows: int, masks: _Floats,
    space: _Floats,
) -> None:  # fmt: skip
    """Open the next pieces, take what no helper takes, and wait until all are done."""
    end = open_pieces(state, count)
    _work(end, LEADER, state, kind, widths, params, stats, first, second, settings, num_rows,
          masks, space)  # fmt: skip
    await_all(state, end)


@compiled(
    "void(int64, int64, int64[::1], int64, int64[::1], float32[:, ::1], float32[:, ::1],"
    "float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[::1],"
    "float32[:, ::1], float32[::1], float32[:, ::1], float32[::1], float32[:, :, ::1],"
    "float32[::1], float32[::1])",
    atomics, head_space, loops, loss_kernels, optimizer_kernels, tickets,
)  # fmt: skip
def step(
    thread: int, end: int, state: _Ints, kind: int, widths: _Ints, params: _Floats,
    stats: _Floats, first: _Floats, second: _Floats, settings: _Floats, rows: _Floats,
    classes: _Ints, labels: _Floats, row_weights: _Floats, class_weights: _Floats,
    smoothing: _Floats, masks: _Floats, space: _Floats, losses: _Floats,
) -> None:  # fmt: skip
    """Move K heads against their losses on a batch.

    Args:
        thread: ``LEADER``; or ``HELPER``, which takes pieces of a step that another thread leads
            with the same arrays, until they come to ``end`` or none is opened for a while.
        end: Number of a piece, of the helper: those of head k begin at k times ``count_pieces``,
            ``FORWARD_PIECES`` of the forward pass first.
        state: (``tickets.STATE_SIZE``,) zeros as the step begins, written.
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
        space: Of ``space_size``, written.
        losses: (K,), written.
    """
    num_rows, last = len(rows), len(widths) - 2
    if thread == HELPER:
        _work(end, thread, state, kind, widths, params, stats, first, second, settings, num_rows,
              masks, space)  # fmt: skip
        return
    normed, _, mean, variance = of_rows(widths, num_rows, space)
    _normalise_rows(rows, normed, mean, variance)
    mask = np.empty((0, 0), np.float32)
    for head in range(len(params)):
        of_head, moments, squares = params[head], first[head], second[head]
        if masks.size:
            mask = masks[head]
        _begin(widths, of_head, stats[head], num_rows, mask, space)
        _share(FORWARD_PIECES, state, kind, widths, params, stats, first, second, settings,
               num_rows, masks, space)  # fmt: skip
        _forward_rest(widths, of_head, stats[head], num_rows, mask, space)
        logits, _, _, grad, _ = outputs(widths, num_rows, last, space)
        weights, smooth = class_weights[head], smoothing[head]
        if labels.size:
            loss = binary_cross_entropy(logits, labels, row_weights, weights, smooth, grad)
        else:
            loss = cross_entropy(logits, classes, row_weights, weights, smooth, grad)
        losses[head] = loss
        _backward_rest(
            kind, widths, of_head, moments, squares, settings[head], num_rows, mask, space
        )
        _share(count_tiles(widths), state, kind, widths, params, stats, first, second, settings,
               num_rows, masks, space)  # fmt: skip
        _end(kind, widths, of_head, moments, squares, settings[head], num_rows, space)
