"""What a training step does besides matrix products, compiled by Numba.

``numpy_kernels`` has the same functions, argument for argument, and documents them. Here sizes,
optimizer and loss are values and not types, so each function is compiled once for float32, and
once more when a training uses float64.

Activations are (U, B): all values of one unit side by side. NaN must come through (a diverging head
is noticed by its loss), so ``fastmath`` never says that there is none. A number of float64 would
make a whole loop float64: all numbers are cast.

Reads, writes: arrays. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.compiling import compiled
from featcache.heads import head, optimizer
from featcache.heads.head import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM

_Array = npt.NDArray[Any]

_VECTOR, _MATRIX = "{0}[::1]", "{0}[:,::1]"


def normalise_columns(x: _Array, normed: _Array, mean: _Array, variance: _Array) -> None:
    """Normalise a batch of features (B, D)."""
    num_rows, width = x.shape
    number = x.dtype.type
    for j in range(width):
        mean[j] = variance[j] = number(0)
    for b in range(num_rows):
        for j in range(width):
            mean[j] += x[b, j]
    for j in range(width):
        mean[j] /= number(num_rows)
    for b in range(num_rows):
        for j in range(width):
            centred = x[b, j] - mean[j]
            normed[b, j] = centred
            variance[j] += centred * centred
    inverse = np.empty_like(mean)
    for j in range(width):
        inverse[j] = number(1) / np.sqrt(variance[j] / number(num_rows) + number(BATCH_NORM_EPS))
        variance[j] /= number(num_rows - 1)
    for b in range(num_rows):
        for j in range(width):
            normed[b, j] *= inverse[j]


def relu_and_normalise(  # noqa: PLR0917
    z: _Array, bias: _Array, scale: _Array, shift: _Array, running_mean: _Array,
    running_var: _Array, normed: _Array, inverse: _Array, out: _Array,
) -> None:  # fmt: skip
    """Finish a hidden layer: bias, ReLU and the batch norm that follows."""
    num_units, num_rows = z.shape
    number = z.dtype.type
    share = number(BATCH_NORM_MOMENTUM)
    for u in range(num_units):
        row, row_normed, row_out = z[u], normed[u], out[u]
        total = number(0)
        for b in range(num_rows):
            value = row[b] + bias[u]
            value = number(0) if value < number(0) else value  # NaN stays
            row[b] = value
            total += value
        mean = total / number(num_rows)
        squares = number(0)
        for b in range(num_rows):
            centred = row[b] - mean
            row_normed[b] = centred
            squares += centred * centred
        factor = number(1) / np.sqrt(squares / number(num_rows) + number(BATCH_NORM_EPS))
        inverse[u] = factor
        for b in range(num_rows):
            row_normed[b] *= factor
        for b in range(num_rows):
            row_out[b] = row_normed[b] * scale[u] + shift[u]
        running_mean[u] += (mean - running_mean[u]) * share
        running_var[u] += (squares / number(num_rows - 1) - running_var[u]) * share


def loss_and_gradient(logits: _Array, weights: _Array, denominators: _Array, grad: _Array) -> float:
    """Return the loss of a batch, and write its gradient."""
    num_classes, num_rows = logits.shape
    number = logits.dtype.type
    zero = number(0)
    total, loss = zero, zero
    for b in range(num_rows):
        total += denominators[b]
    for b in range(num_rows):
        if weights.shape[1] == num_classes:
            largest, powers, weight = logits[0, b], zero, zero
            for c in range(num_classes):
                value = logits[c, b]
                largest = largest if value <= largest else value
            for c in range(num_classes):
                powers += np.exp(logits[c, b] - largest)
                weight += weights[b, c]
            log_sum = largest + np.log(powers)
            for c in range(num_classes):
                log_prob = logits[c, b] - log_sum
                loss -= weights[b, c] * log_prob
                grad[c, b] = (np.exp(log_prob) * weight - weights[b, c]) / total
        else:
            for c in range(num_classes):
                value, yes, no = logits[c, b], weights[b, c], weights[b, num_classes + c]
                log_prob = (value if value < zero else zero) - np.log1p(np.exp(-np.abs(value)))
                loss += no * value - (yes + no) * log_prob
                grad[c, b] = (np.exp(log_prob) * (yes + no) - yes) / total
    mean: float = loss / total
    return mean


def norm_and_relu_backward(  # noqa: PLR0917
    grad: _Array, normed: _Array, inverse: _Array, scale: _Array, active: _Array, out: _Array,
    scale_grad: _Array, shift_grad: _Array, bias_grad: _Array,
) -> None:  # fmt: skip
    """Take a gradient back through a batch norm and the ReLU before it."""
    num_units, num_rows = grad.shape
    number = grad.dtype.type
    zero = number(0)
    for u in range(num_units):
        row, row_normed, row_out, row_active = grad[u], normed[u], out[u], active[u]
        by_scale, by_shift, by_bias = zero, zero, zero
        for b in range(num_rows):
            by_scale += row[b] * row_normed[b]
            by_shift += row[b]
        factor = scale[u] * inverse[u]
        mean, slope = by_shift / number(num_rows), by_scale / number(num_rows)
        for b in range(num_rows):
            value = factor * (row[b] - mean - row_normed[b] * slope)
            value = value if row_active[b] > zero else zero
            row_out[b] = value
            by_bias += value
        scale_grad[u], shift_grad[u], bias_grad[u] = by_scale, by_shift, by_bias


def move_layer(  # noqa: PLR0917
    grad: _Array, bias_grad: _Array, scale: _Array, shift: _Array, weights: _Array, first: _Array,
    second: _Array, scale_grad: _Array, shift_grad: _Array, settings: _Array,
) -> None:  # fmt: skip
    """Move some units of a layer whose input was ``normed * scale + shift``."""
    num_units, width = weights.shape
    number = weights.dtype.type
    is_sgd, step = settings[optimizer.IS_SGD], settings[optimizer.STEP]
    coupled_decay, weight_factor = (
        settings[optimizer.COUPLED_DECAY],
        settings[optimizer.WEIGHT_FACTOR],
    )
    decay, second_decay = settings[optimizer.DECAY], settings[optimizer.SECOND_DECAY]
    inverse_root_correction, eps = (
        settings[optimizer.INVERSE_ROOT_CORRECTION],
        settings[optimizer.EPS],
    )
    share, second_share = number(1) - decay, number(1) - second_decay
    for j in range(width):
        scale_grad[j] = shift_grad[j] = number(0)
    for u in range(num_units):
        h, w, m, v, s = grad[u], weights[u], first[u], second[u], bias_grad[u]
        if is_sgd > number(0):
            for j in range(width):
                scale_grad[j] += w[j] * h[j]
                shift_grad[j] += w[j] * s
                slope = scale[j] * h[j] + shift[j] * s + coupled_decay * w[j]
                m[j] = decay * m[j] + slope
                w[j] -= step * m[j]
        else:
            for j in range(width):
                scale_grad[j] += w[j] * h[j]
                shift_grad[j] += w[j] * s
                slope = scale[j] * h[j] + shift[j] * s + coupled_decay * w[j]
                moment = m[j] + (slope - m[j]) * share
                square = v[j] * second_decay + slope * slope * second_share
                m[j] = moment
                v[j] = square
                w[j] = weight_factor * w[j] - step * moment / (
                    np.sqrt(square) * inverse_root_correction + eps
                )


def move_values(
    grads: _Array, values: _Array, first: _Array, second: _Array, settings: _Array
) -> None:
    """Move values (n,) against their gradients."""
    number = values.dtype.type
    is_sgd, step = settings[optimizer.IS_SGD], settings[optimizer.STEP]
    coupled_decay, weight_factor = (
        settings[optimizer.COUPLED_DECAY],
        settings[optimizer.WEIGHT_FACTOR],
    )
    decay, second_decay = settings[optimizer.DECAY], settings[optimizer.SECOND_DECAY]
    inverse_root_correction, eps = (
        settings[optimizer.INVERSE_ROOT_CORRECTION],
        settings[optimizer.EPS],
    )
    share, second_share = number(1) - decay, number(1) - second_decay
    if is_sgd > number(0):
        for j in range(values.size):
            first[j] = decay * first[j] + grads[j] + coupled_decay * values[j]
            values[j] -= step * first[j]
    else:
        for j in range(values.size):
            slope = grads[j] + coupled_decay * values[j]
            moment = first[j] + (slope - first[j]) * share
            square = second[j] * second_decay + slope * slope * second_share
            first[j] = moment
            second[j] = square
            values[j] = weight_factor * values[j] - step * moment / (
                np.sqrt(square) * inverse_root_correction + eps
            )


def shuffle(order: _Array, places: _Array) -> None:
    """Swap, for each i in turn, the entries i and ``places[i]`` of an order."""
    for i in range(places.size):
        kept = order[i]
        order[i] = order[places[i]]
        order[places[i]] = kept


_SIGNATURES: dict[Any, str] = {
    normalise_columns: f"void({_MATRIX}, {_MATRIX}, {_VECTOR}, {_VECTOR})",
    relu_and_normalise: f"void({_MATRIX}, {', '.join([_VECTOR] * 5)}, {_MATRIX}, {_VECTOR}, "
    f"{_MATRIX})",
    loss_and_gradient: f"{{0}}({_MATRIX}, {_MATRIX}, {_VECTOR}, {_MATRIX})",
    norm_and_relu_backward: f"void({_MATRIX}, {_MATRIX}, {_VECTOR}, {_VECTOR}, {_MATRIX}, "
    f"{_MATRIX}, {', '.join([_VECTOR] * 3)})",
    move_layer: f"void({_MATRIX}, {', '.join([_VECTOR] * 3)}, {', '.join([_MATRIX] * 3)}, "
    f"{', '.join([_VECTOR] * 3)})",
    move_values: f"void({', '.join([_VECTOR] * 5)})",
    shuffle: "void(i8[::1], i8[::1])",
}
_lock = threading.Lock()
_loaded: dict[str, SimpleNamespace] = {}


def load(dtype: npt.DTypeLike) -> Any:
    """Return the functions compiled for ``float32`` or ``float64``, kept on the disk."""
    code = {4: "f4", 8: "f8"}[np.dtype(dtype).itemsize]
    with _lock:
        if code not in _loaded:
            _loaded[code] = SimpleNamespace(
                **{
                    function.__name__: compiled(
                        signature.format(code), head, optimizer, sums_reorder=True
                    )(function)
                    for function, signature in _SIGNATURES.items()
                }
            )
        return _loaded[code]
