"""Training steps of heads on the CPU, compiled by Numba. Imported late, by ``compiled_stack``.

A step is forward, loss, backward and optimizer, head after head. The optimizer moves a layer as
soon as its gradient is there: see ``weight_kernels``.

A head is the flat arrays of ``stack.HeadStack``: parameters in the order of its state dict (of each
layer: batch norm's weight and bias, then the linear layer's), running statistics likewise (of each
layer: mean, variance). ``widths`` is D, the hidden widths, C. The formulas are those of ``stack``
and ``loss``. Rows (B, D) come as they are; what layers put out is turned, (width, B), so that a
batch norm works through one unit after the other.

A step's work is cut into pieces, the same for every number of threads: the first layer's forward
pass for some of its units, then each tile of the weights of all layers. What is summed over pieces
is summed in their order, so the result is the same to the last bit, whoever takes which.

Numba shapes the code. One number of float64 makes a whole loop float64, so all are cast. LLVM gives
up on a loop that writes to several arrays, as each may overlap the others: a row is worked through
in several short loops in place of a long one.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import compiled, part
from featcache.heads.compiled import (
    atomics,
    head_space,
    loops,
    loss_kernels,
    norm_kernels,
    optimizer_kernels,
    products,
    tickets,
    vectors,
    weight_kernels,
)
from featcache.heads.compiled.head_space import (
    FORWARD_UNITS,
    TILE_ROWS,
    at_layer,
    at_params,
    count_forward,
    count_tiles,
    matrix,
    norm_grads_of,
    of_rows,
    outputs,
    tiles_of,
)
from featcache.heads.compiled.loops import (
    add_products,
    mask_units,
    scale_and_shift,
    sum_of,
    sum_of_products,
    turn,
)
from featcache.heads.compiled.loss_kernels import binary_cross_entropy, cross_entropy
from featcache.heads.compiled.norm_kernels import BATCH_NORM_EPS, normalise_rows, track
from featcache.heads.compiled.optimizer_kernels import move
from featcache.heads.compiled.products import multiply
from featcache.heads.compiled.tickets import (
    PATIENCE,
    await_all,
    await_piece,
    end_piece,
    open_pieces,
    take_piece,
)
from featcache.heads.compiled.weight_kernels import move_weights

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

LEADER, HELPER = 0, 1  # ``thread`` of ``steps``

_ONE = np.float32(1)


# --- Forward


@part
def _begin(
    widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Track the rows' statistics and put the rows through the first batch norm."""
    normed, turned, shown, again, mean, variance = of_rows(widths, num_rows, space)
    wide = widths[0]
    for j in range(wide):
        track(stats, j, mean[j])
        track(stats, wide + j, variance[j])
        scale_and_shift(turned[j], params[j], params[wide + j], shown[j])
    if len(widths) == 2 and mask.size:
        scale, shift = params[:wide], params[wide : 2 * wide]
        for row in range(num_rows):
            for j in range(wide):
                again[row, j] = (normed[row, j] * scale[j] + shift[j]) * mask[row, j]
        turn(again, shown)


@part
def _activate(
    layer: int, lowest: int, end: int, widths: _Ints, params: _Floats, stats: _Floats,
    num_rows: int, space: _Floats,
) -> None:  # fmt: skip
    """Add biases to some units of a layer and, but for logits, put them through ReLU and norm."""
    out, normed, _, _, _, inverse = outputs(widths, num_rows, layer, space)
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
        inverse[unit] = _ONE / np.sqrt(variance + BATCH_NORM_EPS)
        scale_and_shift(centred, inverse[unit], np.float32(0), centred)
        track(stats, at_stats + unit, mean)
        track(stats, at_stats + narrow + unit, variance * correction)


@part
def _forward_units(
    piece: int, widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, space: _Floats
) -> None:
    """Run the rows through some units of the first layer."""
    wide, lowest = widths[0], piece * FORWARD_UNITS
    end = min(lowest + FORWARD_UNITS, widths[1])
    shown, out = of_rows(widths, num_rows, space)[2], outputs(widths, num_rows, 0, space)[0]
    weights = matrix(params, 2 * wide, widths[1], wide)
    multiply(weights[lowest:end], shown, wide, out[lowest:end])
    _activate(0, lowest, end, widths, params, stats, num_rows, space)


@part
def _forward_rest(
    widths: _Ints, params: _Floats, stats: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Run all layers but the first."""
    for layer in range(1, len(widths) - 1):
        wide, narrow, at = widths[layer], widths[layer + 1], at_params(widths, layer)
        _, normed, shown, _, turned, _ = outputs(widths, num_rows, layer - 1, space)
        for unit in range(wide):
            scale_and_shift(normed[unit], params[at + unit], params[at + wide + unit], shown[unit])
        if layer == len(widths) - 2:
            mask_units(shown, mask)
        turn(shown, turned)
        weights = matrix(params, at + 2 * wide, narrow, wide)
        multiply(weights, shown, wide, outputs(widths, num_rows, layer, space)[0])
        _activate(layer, 0, narrow, widths, params, stats, num_rows, space)


# --- Backward


@part
def _move_biases(
    kind: int, at: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats,
) -> _Floats:  # fmt: skip
    """Move the biases (H,) that begin at ``at``; return the row sums of the gradient (H, B)."""
    sums = np.empty(len(grad), np.float32)
    for unit in range(len(grad)):
        sums[unit] = sum_of(grad[unit])
    end = at + len(grad)
    move(kind, params[at:end], sums, first[at:end], second[at:end], settings)
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
        out, normed, _, below, _, inverse = outputs(widths, num_rows, layer - 1, space)
        multiply(matrix(params, at + 2 * wide, narrow, wide).T, grad, narrow, below)
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
def _grade_rows(
    widths: _Ints, params: _Floats, num_rows: int, mask: _Floats, space: _Floats
) -> None:
    """Set the gradients of a linear head's batch norm, with dropout between it and the weights."""
    wide, narrow = widths[0], widths[1]
    normed, _, shown, _, _, _ = of_rows(widths, num_rows, space)
    grad = outputs(widths, num_rows, 0, space)[3]
    below = shown.reshape(num_rows, wide)  # of the forward pass no more
    multiply(grad.T, matrix(params, 2 * wide, narrow, wide), narrow, below)
    for tile in range(tiles_of(widths, 0)):
        norm_grads_of(widths, num_rows, tile, space)[:] = np.float32(0)
    by_scale, by_shift = norm_grads_of(widths, num_rows, 0, space)
    add_products(below, mask, by_shift)
    for row in range(num_rows):
        for j in range(wide):
            below[row, j] *= mask[row, j]
    add_products(below, normed, by_scale)


@part
def _move_tile(
    tile: int, kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, num_rows: int, masks: _Floats, space: _Floats,
) -> None:  # fmt: skip
    """Move a tile of some layer's weights and its biases.

    The first layer's input is the normalised rows, scaled and shifted: the gradients of that batch
    norm come with those of the weights (see ``stack``'s docstring), unless dropout is in between.
    Other layers' input, and such rows, are at hand.
    """
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
    scale, shift = np.ones(wide, np.float32), np.zeros(wide, np.float32)
    norm_grads = np.zeros((2, wide), np.float32)
    if layer > 0:
        rows = outputs(widths, num_rows, layer - 1, space)[4]
    elif len(widths) == 2 and masks.size:
        rows = of_rows(widths, num_rows, space)[3]
    else:
        rows = of_rows(widths, num_rows, space)[0]
        scale, shift = params[:wide], params[wide : 2 * wide]
        norm_grads = norm_grads_of(widths, num_rows, place, space)
        norm_grads[:] = np.float32(0)
    begin = at + 2 * wide + start * wide
    move_weights(
        kind, grad, rows, sums, scale, shift, norm_grads, matrix(params, begin, num, wide),
        matrix(first, begin, num, wide), matrix(second, begin, num, wide), settings,
    )  # fmt: skip


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


# --- The steps


@part
def _patience(widths: _Ints, ends: _Ints) -> int:
    """Return how often is looked for a piece to end: twice as long as the largest should take.

    2 x ``FORWARD_UNITS`` x D x B operations at 100 GFLOP/s, and a look takes 20 ns.
    """
    largest = int(ends[0])
    for batch in range(1, len(ends)):
        largest = max(largest, int(ends[batch] - ends[batch - 1]))
    return PATIENCE + FORWARD_UNITS * int(widths[0]) * largest // 500


@part
def _mask_of(
    masks: _Floats, start: int, end: int, head: int, num_heads: int, widths: _Ints
) -> _Floats:
    """Return the dropout mask (B, last width) of a batch and a head, or an empty one."""
    wide, num_rows = widths[len(widths) - 2], end - start
    if not masks.size:
        return matrix(masks, 0, 0, 0)
    return matrix(masks, (start * num_heads + head * num_rows) * wide, num_rows, wide)


@part
def _judge(
    start: int, end: int, widths: _Ints, classes: _Ints, labels: _Floats, row_weights: _Floats,
    weights: _Floats, smoothing: np.float32, space: _Floats,
) -> np.float32:  # fmt: skip
    """Return a head's loss on a batch and set the gradient of its logits."""
    logits, _, _, grad, _, _ = outputs(widths, end - start, len(widths) - 2, space)
    of_rows = row_weights[start:end]
    if labels.size:
        return binary_cross_entropy(logits, labels[start:end], of_rows, weights, smoothing, grad)
    return cross_entropy(logits, classes[start:end], of_rows, weights, smoothing, grad)


@part
def _count_pieces(widths: _Ints) -> int:
    """Return in how many pieces the work of a head's step is cut."""
    return count_forward(widths) + count_tiles(widths)


@compiled("int64(int64[::1], int64)", head_space)
def space_size(widths: _Ints, num_rows: int) -> int:
    """Return how many float32 a step of ``num_rows`` rows works in."""
    return at_layer(widths, num_rows, len(widths) - 1)


@part
def _work(
    end: int, thread: int, state: _Ints, kind: int, widths: _Ints, params: _Floats,
    stats: _Floats, first: _Floats, second: _Floats, settings: _Floats, ends: _Ints, masks: _Floats,
    patience: int, space: _Floats,
) -> None:  # fmt: skip
    """Do pieces before ``end`` until none is left; the helper waits for more to be opened."""
    per_head, num_forward = _count_pieces(widths), count_forward(widths)
    while True:
        piece = take_piece(state, end) if thread == LEADER else await_piece(state, end, patience)
        if piece < 0:
            return
        number, place = piece // per_head, piece % per_head
        batch, head = number // len(params), number % len(params)
        num_rows = ends[batch] - (ends[batch - 1] if batch else 0)
        if place < num_forward:
            _forward_units(place, widths, params[head], stats[head], num_rows, space)
        else:
            _move_tile(
                place - num_forward, kind, widths, params[head], first[head], second[head],
                settings[batch, head], num_rows, masks, space,
            )  # fmt: skip
        end_piece(state)


@part
def _share(
    count: int, state: _Ints, kind: int, widths: _Ints, params: _Floats, stats: _Floats,
    first: _Floats, second: _Floats, settings: _Floats, ends: _Ints, masks: _Floats,
    patience: int, space: _Floats,
) -> None:  # fmt: skip
    """Open the next pieces, take what no helper takes, and wait until all are done."""
    end = open_pieces(state, count)
    _work(end, LEADER, state, kind, widths, params, stats, first, second, settings, ends, masks,
          patience, space)  # fmt: skip
    await_all(state, end, patience)


@compiled(
    "void(int64, int64[::1], int64, int64[::1], float32[:, ::1], float32[:, ::1],"
    "float32[:, ::1], float32[:, ::1], float32[:, :, ::1], int64[::1], float32[:, ::1],"
    "int64[::1], float32[:, ::1], float32[::1], float32[:, ::1], float32[::1], float32[::1],"
    "float32[::1], float32[:, ::1])",
    atomics, head_space, loops, loss_kernels, norm_kernels, optimizer_kernels, products, tickets,
    vectors, weight_kernels,
)  # fmt: skip
def steps(
    thread: int, state: _Ints, kind: int, widths: _Ints, params: _Floats, stats: _Floats,
    first: _Floats, second: _Floats, settings: _Floats, ends: _Ints, rows: _Floats,
    classes: _Ints, labels: _Floats, row_weights: _Floats, class_weights: _Floats,
    smoothing: _Floats, masks: _Floats, space: _Floats, losses: _Floats,
) -> None:  # fmt: skip
    """Move K heads against their losses on S batches, one after the other, of N rows in all.

    Args:
        thread: ``LEADER``; or ``HELPER``, which takes pieces of steps that another thread leads
            with the same arrays, until they are done or none is opened for long.
        state: (``tickets.STATE_SIZE``,) zeros as the steps begin, written.
        kind: See ``optimizer_kernels``.
        widths: D, the hidden widths, C.
        params: (K, P), written.
        stats: (K, S), written: they move a tenth of the way.
        first: (K, P) moments, written; of SGD the momentum.
        second: (K, P) moments, written; not looked at with SGD.
        settings: (S, K, 4): learning rate, weight decay and Adam's corrections, 1 - beta ** steps.
        ends: (S,) where each batch ends; two rows or more are in each.
        rows: (N, D).
        classes: (N,) from 0 to C - 1; not looked at where there are labels.
        labels: (N, C) of 0, 1 and NaN, or (0, 0): one class a row.
        row_weights: (N,), or (0,): all count alike.
        class_weights: (K, C).
        smoothing: (K,).
        masks: To multiply the last layer's input by: (K, B, last width) of each batch, flat one
            after the other, or (0,): no dropout.
        space: Of ``space_size`` for the largest batch, written.
        losses: (S, K), written.
    """
    patience = _patience(widths, ends)
    if thread == HELPER:
        end = len(ends) * len(params) * _count_pieces(widths)
        _work(end, thread, state, kind, widths, params, stats, first, second, settings, ends,
              masks, patience, space)  # fmt: skip
        return
    start = 0
    for batch in range(len(ends)):
        end = ends[batch]
        normed, turned, _, _, mean, variance = of_rows(widths, end - start, space)
        normalise_rows(rows[start:end], normed, turned, mean, variance)
        for head in range(len(params)):
            mask = _mask_of(masks, start, end, head, len(params), widths)
            of_head, moments, squares = params[head], first[head], second[head]
            of_step = settings[batch, head]
            _begin(widths, of_head, stats[head], end - start, mask, space)
            _share(count_forward(widths), state, kind, widths, params, stats, first, second,
                   settings, ends, masks, patience, space)  # fmt: skip
            _forward_rest(widths, of_head, stats[head], end - start, mask, space)
            losses[batch, head] = _judge(
                start, end, widths, classes, labels, row_weights, class_weights[head],
                smoothing[head], space,
            )  # fmt: skip
            if len(widths) == 2 and masks.size:
                _grade_rows(widths, of_head, end - start, mask, space)
            _backward_rest(
                kind, widths, of_head, moments, squares, of_step, end - start, mask, space
            )
            _share(count_tiles(widths), state, kind, widths, params, stats, first, second, settings,
                   ends, masks, patience, space)  # fmt: skip
            _end(kind, widths, of_head, moments, squares, of_step, end - start, space)
        start = end
