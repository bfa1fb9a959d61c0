"""A training step of one head on the CPU, compiled by Numba. Imported late, by ``compiled_stack``.

A step is one call: forward, loss, backward and optimizer, head after head. The optimizer moves a
layer as soon as its gradient is there, while both are in the core's own cache: of the 20 MB that
Adam moves for a head of 0.7 M parameters, the gradient's 6 never leave it. Products are calls of
SciPy's OpenBLAS: 75 GFLOP/s on a Zen 3 core at these shapes, where torch's MKL reaches 57.

A head is the flat arrays of ``stack.HeadStack``: parameters in the order of its state dict (of each
layer: batch norm's weight and bias, then the linear layer's), running statistics likewise (of each
layer: mean, variance). ``widths`` is D, the hidden widths, C. The formulas are those of ``stack``
and ``loss``.

Numba shapes the code. One number of float64 makes a whole loop float64, so all are cast. LLVM gives
up on a loop that writes to several arrays, as each may overlap the others: a row is worked through
in several short loops in place of a long one.

Reads: arrays. Writes: those said to be. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import compiled, part

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

ADAM, ADAMW, SGD = 0, 1, 2  # ``kind`` of ``step``

_TILE_ROWS = 64  # 64 x 1280 of float32 lie in a second-level cache beside what they are added to
_ONE, _HALF = np.float32(1), np.float32(0.5)
_BATCH_NORM_EPS, _BATCH_NORM_MOMENTUM = np.float32(1e-5), np.float32(0.1)
_BETA_1, _BETA_2, _ADAM_EPS = np.float32(0.9), np.float32(0.999), np.float32(1e-8)
_SGD_MOMENTUM = np.float32(0.9)


@part
def _matrix(flat: _Floats, start: int, rows: int, columns: int) -> _Floats:
    return flat[start : start + rows * columns].reshape(rows, columns)


@part
def _scale_and_shift(values: _Floats, scale: _Floats, shift: _Floats, out: _Floats) -> None:
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[row, j] = values[row, j] * scale[j] + shift[j]


@part
def _multiply(values: _Floats, factors: _Floats) -> None:
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            values[row, j] *= factors[row, j]


@part
def _sum_rows(values: _Floats, sums: _Floats) -> None:
    sums[:] = np.float32(0)
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            sums[j] += values[row, j]


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
def _sum_products(left: _Floats, right: _Floats, sums: _Floats) -> None:
    sums[:] = np.float32(0)
    _add_products(left, right, sums)


@part
def _track(running: _Floats, current: _Floats, factor: np.float32) -> None:
    for j in range(len(running)):
        running[j] += _BATCH_NORM_MOMENTUM * (current[j] * factor - running[j])


@part
def _normalise_rows(values: _Floats, normed: _Floats, mean: _Floats, variance: _Floats) -> None:
    """Subtract each column's mean and divide by its deviation; set mean and variance (biased)."""
    share = _ONE / np.float32(values.shape[0])
    _sum_rows(values, mean)
    for j in range(len(mean)):
        mean[j] *= share
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            normed[row, j] = values[row, j] - mean[j]
    _sum_products(normed, normed, variance)
    for j in range(len(variance)):
        variance[j] *= share
    for row in range(values.shape[0]):
        for j in range(values.shape[1]):
            normed[row, j] *= _ONE / np.sqrt(variance[j] + _BATCH_NORM_EPS)


@part
def _forward(
    widths: _Ints, params: _Floats, stats: _Floats, rows: _Floats, mean: _Floats,
    variance: _Floats, mask: _Floats, kept: _Floats, logits: _Floats,
) -> None:  # fmt: skip
    """Run normalised rows through a head; move its statistics; keep what ``_backward`` needs.

    ``variance`` is with Bessel's correction, as running statistics take it.
    """
    num_rows, last = rows.shape[0], len(widths) - 2
    correction = np.float32(num_rows / (num_rows - 1))
    _track(stats[: widths[0]], mean, _ONE)
    _track(stats[widths[0] : 2 * widths[0]], variance, _ONE)
    at, place, at_stats, normed = 0, 0, 2 * widths[0], rows
    for layer in range(last + 1):
        wide, narrow = widths[layer], widths[layer + 1]
        weights = _matrix(params, at + 2 * wide, narrow, wide)
        at_bias = at + 2 * wide + narrow * wide
        bias = params[at_bias : at_bias + narrow]
        shown = np.empty((num_rows, wide), np.float32)
        if layer == last:
            shown = _matrix(kept, place, num_rows, wide)
        _scale_and_shift(normed, params[at : at + wide], params[at + wide : at + 2 * wide], shown)
        if layer == last:
            if mask.size:
                _multiply(shown, mask)
            np.dot(shown, weights.T, logits)
            for row in range(num_rows):
                for j in range(narrow):
                    logits[row, j] += bias[j]
            return
        out = _matrix(kept, place, num_rows, narrow)
        normed = _matrix(kept, place + num_rows * narrow, num_rows, narrow)
        place += 2 * num_rows * narrow
        inverse = kept[place : place + narrow]
        flipped = np.dot(weights, shown.T)  # 0.39 ms at 512 x 1280; the other way round 0.60
        for row in range(num_rows):
            for j in range(narrow):
                out[row, j] = max(flipped[j, row] + bias[j], np.float32(0))
        means = np.empty(narrow, np.float32)
        _normalise_rows(out, normed, means, inverse)
        _track(stats[at_stats : at_stats + narrow], means, _ONE)
        _track(stats[at_stats + narrow : at_stats + 2 * narrow], inverse, correction)
        for j in range(narrow):
            inverse[j] = _ONE / np.sqrt(inverse[j] + _BATCH_NORM_EPS)
        at = at_bias + narrow
        place += narrow
        at_stats += 2 * narrow


@part
def _cross_entropy(
    logits: _Floats, classes: _Ints, row_weights: _Floats, weights: _Floats, smoothing: np.float32,
    grad: _Floats,
) -> np.float32:  # fmt: skip
    """Return the loss of a batch and set its gradient, both (B, C): one class a row."""
    num_rows, num_classes = logits.shape
    total, sum_of_weights = np.float32(0), np.float32(0)
    for j in range(num_classes):
        sum_of_weights += weights[j]
    for row in range(num_rows):
        of_row = row_weights[row] if row_weights.size else _ONE
        total += weights[classes[row]] * of_row
    loss = np.float32(0)
    for row in range(num_rows):
        of_row = (row_weights[row] if row_weights.size else _ONE) / total
        shared = smoothing / np.float32(num_classes) * of_row
        own = weights[classes[row]] * (_ONE - smoothing) * of_row
        top, norm = logits[row].max(), np.float32(0)
        for j in range(num_classes):
            grad[row, j] = np.exp(logits[row, j] - top)
            norm += grad[row, j]
        log_norm, counted = top + np.log(norm), own + shared * sum_of_weights
        for j in range(num_classes):
            wanted = shared * weights[j]
            if j == classes[row]:
                wanted += own
            loss += wanted * (log_norm - logits[row, j])
            grad[row, j] = grad[row, j] / norm * counted - wanted
    return loss


@part
def _binary_cross_entropy(
    logits: _Floats, labels: _Floats, row_weights: _Floats, weights: _Floats,
    smoothing: np.float32, grad: _Floats,
) -> np.float32:  # fmt: skip
    """Return the loss of a batch and set its gradient, both (B, C): several labels a row."""
    num_rows, num_classes = logits.shape
    total = np.float32(0)
    for row in range(num_rows):
        of_row = row_weights[row] if row_weights.size else _ONE
        for j in range(num_classes):
            if not np.isnan(labels[row, j]):
                total += of_row
    loss = np.float32(0)
    for row in range(num_rows):
        of_row = (row_weights[row] if row_weights.size else _ONE) / total
        for j in range(num_classes):
            if np.isnan(labels[row, j]):
                grad[row, j] = np.float32(0)
                continue
            logit, share = logits[row, j], labels[row, j] * (_ONE - smoothing) + smoothing * _HALF
            yes, no = share * weights[j] * of_row, (_ONE - share) * of_row
            small = np.exp(-abs(logit))
            log_prob = min(logit, np.float32(0)) - np.log1p(small)
            loss += no * logit - (yes + no) * log_prob
            prob = (_ONE if logit > 0 else small) / (_ONE + small)
            grad[row, j] = prob * (yes + no) - yes
    return loss


@part
def _move(
    kind: int, param: _Floats, grad: _Floats, first: _Floats, second: _Floats, settings: _Floats
) -> None:
    """Move some parameters against their gradient, which is overwritten."""
    rate, decay = settings[0], settings[1]
    if decay != 0 and kind == ADAMW:
        for j in range(len(param)):
            param[j] -= rate * decay * param[j]
    elif decay != 0:
        for j in range(len(param)):
            grad[j] += decay * param[j]
    if kind == SGD:
        for j in range(len(param)):
            first[j] = _SGD_MOMENTUM * first[j] + grad[j]
            param[j] -= rate * first[j]
        return
    step, root = rate / settings[2], _ONE / np.sqrt(settings[3])
    for j in range(len(param)):
        first[j] += (_ONE - _BETA_1) * (grad[j] - first[j])
        second[j] = _BETA_2 * second[j] + (_ONE - _BETA_2) * grad[j] * grad[j]
        param[j] -= step * first[j] / (np.sqrt(second[j]) * root + _ADAM_EPS)


@part
def _move_first_layer(
    kind: int, wide: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats, sums: _Floats, rows: _Floats, tile: _Floats,
) -> None:  # fmt: skip
    """Move the first layer's weights and the batch norm before it: see ``stack``'s docstring.

    ``grad`` is (H, B), the gradient of what the layer puts out, and ``sums`` (H,) its row sums.
    """
    scale, shift = params[:wide], params[wide : 2 * wide]
    norm_grads = np.zeros(2 * wide, np.float32)
    scale_grad, shift_grad = norm_grads[:wide], norm_grads[wide:]
    for start in range(0, len(grad), _TILE_ROWS):
        num = min(_TILE_ROWS, len(grad) - start)
        products = _matrix(tile, 0, num, wide)
        np.dot(grad[start : start + num], rows, products)
        weights = _matrix(params, 2 * wide + start * wide, num, wide)
        totals = sums[start : start + num]
        shift_grad += np.dot(totals, weights)
        _add_products(weights, products, scale_grad)
        for row in range(num):
            product, total, at = products[row], totals[row], 2 * wide + (start + row) * wide
            for j in range(wide):
                product[j] = product[j] * scale[j] + total * shift[j]
            _move(kind, weights[row], product, first[at : at + wide], second[at : at + wide],
                  settings)  # fmt: skip
    _move(kind, params[: 2 * wide], norm_grads, first[: 2 * wide], second[: 2 * wide], settings)


@part
def _move_weights(
    kind: int, at: int, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    grad: _Floats, shown: _Floats, tile: _Floats,
) -> None:  # fmt: skip
    """Move the weights (H, W) that begin at ``at``, by gradients (H, B) and inputs (B, W)."""
    wide = shown.shape[1]
    for start in range(0, len(grad), _TILE_ROWS):
        num = min(_TILE_ROWS, len(grad) - start)
        products = _matrix(tile, 0, num, wide)
        np.dot(grad[start : start + num], shown, products)
        begin, end = at + start * wide, at + (start + num) * wide
        _move(kind, params[begin:end], tile[: num * wide], first[begin:end], second[begin:end],
              settings)  # fmt: skip


@part
def _through_norm(
    grad: _Floats, normed: _Floats, scale: _Floats, inverse: _Floats, norm_grads: _Floats,
    out: _Floats,
) -> None:  # fmt: skip
    """Turn the gradient (B, W) of a batch norm's output into that of a ReLU's input before it."""
    wide, share = grad.shape[1], _ONE / np.float32(grad.shape[0])
    scale_grad, shift_grad = norm_grads[:wide], norm_grads[wide : 2 * wide]
    for row in range(grad.shape[0]):
        for j in range(wide):
            value = grad[row, j] - share * (shift_grad[j] + normed[row, j] * scale_grad[j])
            value *= scale[j] * inverse[j]
            grad[row, j] = value if out[row, j] > 0 else np.float32(0)


@part
def _backward(
    kind: int, widths: _Ints, params: _Floats, first: _Floats, second: _Floats, settings: _Floats,
    rows: _Floats, mask: _Floats, grad: _Floats, kept: _Floats,
) -> None:  # fmt: skip
    """Move a head against ``grad`` (B, C), its loss's gradient by the logits."""
    num_rows, last = rows.shape[0], len(widths) - 2
    tile = np.empty(_TILE_ROWS * widths[:-1].max(), np.float32)
    at, place = len(params), len(kept)
    for layer in range(last, -1, -1):
        wide, narrow = widths[layer], widths[layer + 1]
        at -= 2 * wide + narrow * wide + narrow
        at_weights, at_bias = at + 2 * wide, at + 2 * wide + narrow * wide
        flipped, sums = np.empty((narrow, num_rows), np.float32), np.empty(narrow, np.float32)
        flipped[:] = grad.T
        _sum_rows(grad, sums)
        if layer == 0 < last:
            _move_first_layer(
                kind, wide, params, first, second, settings, flipped, sums, rows, tile
            )
        else:
            below = np.dot(grad, _matrix(params, at_weights, narrow, wide))
            scale, shift = params[at : at + wide], params[at + wide : at_weights]
            normed, shown = rows, np.empty((num_rows, wide), np.float32)
            if layer > 0:
                begin = (
                    place - (num_rows if layer == last else 0) * wide - (2 * num_rows + 1) * wide
                )
                normed = _matrix(kept, begin + num_rows * wide, num_rows, wide)
            if layer == last:
                place -= num_rows * wide
                shown = _matrix(kept, place, num_rows, wide)
                if mask.size:
                    _multiply(below, mask)
            else:
                _scale_and_shift(normed, scale, shift, shown)
            _move_weights(kind, at_weights, params, first, second, settings, flipped, shown, tile)
            norm_grads = np.empty(2 * wide, np.float32)
            _sum_products(below, normed, norm_grads[:wide])
            _sum_rows(below, norm_grads[wide:])
            if layer > 0:
                place -= (2 * num_rows + 1) * wide
                out = _matrix(kept, place, num_rows, wide)
                inverse = kept[place + 2 * num_rows * wide :][:wide]
                _through_norm(below, normed, scale, inverse, norm_grads, out)
            _move(kind, params[at:at_weights], norm_grads, first[at:at_weights],
                  second[at:at_weights], settings)  # fmt: skip
            grad = below
        _move(kind, params[at_bias : at_bias + narrow], sums, first[at_bias : at_bias + narrow],
              second[at_bias : at_bias + narrow], settings)  # fmt: skip


@compiled(
    "void(int64, int64[::1], float32[:, ::1], float32[:, ::1], float32[:, ::1], float32[:, ::1],"
    "float32[:, ::1], float32[:, ::1], int64[::1], float32[:, ::1], float32[::1], float32[:, ::1],"
    "float32[::1], float32[:, :, ::1], float32[::1])"
)
def step(
    kind: int, widths: _Ints, params: _Floats, stats: _Floats, first: _Floats, second: _Floats,
    settings: _Floats, rows: _Floats, classes: _Ints, labels: _Floats, row_weights: _Floats,
    class_weights: _Floats, smoothing: _Floats, masks: _Floats, losses: _Floats,
) -> None:  # fmt: skip
    """Move K heads against their losses on a batch.

    Args:
        kind: ``ADAM``, ``ADAMW`` or ``SGD``.
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
        losses: (K,), written.
    """
    (num_rows, num_features), num_classes = rows.shape, widths[-1]
    normed = np.empty((num_rows, num_features), np.float32)
    mean, variance = np.empty(num_features, np.float32), np.empty(num_features, np.float32)
    _normalise_rows(rows, normed, mean, variance)
    correction = np.float32(num_rows / (num_rows - 1))
    for j in range(num_features):
        variance[j] *= correction
    hidden = widths[1:-1].sum()
    kept = np.empty(hidden * (2 * num_rows + 1) + widths[-2] * num_rows, np.float32)
    logits = np.empty((num_rows, num_classes), np.float32)
    grad = np.empty((num_rows, num_classes), np.float32)
    mask = np.empty((0, 0), np.float32)
    for head in range(len(params)):
        if masks.size:
            mask = masks[head]
        _forward(widths, params[head], stats[head], normed, mean, variance, mask, kept, logits)
        weights, smooth = class_weights[head], smoothing[head]
        if labels.size:
            loss = _binary_cross_entropy(logits, labels, row_weights, weights, smooth, grad)
        else:
            loss = _cross_entropy(logits, classes, row_weights, weights, smooth, grad)
        losses[head] = loss
        _backward(kind, widths, params[head], first[head], second[head], settings[head], normed,
                  mask, grad, kept)  # fmt: skip
