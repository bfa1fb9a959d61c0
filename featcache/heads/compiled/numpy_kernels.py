"""What a training step does besides matrix products, in plain NumPy.

For small trainings, where loading compiled code costs more than it saves, and for machines without
Numba: ``kernels`` has the same functions compiled.

B is the rows of a batch, U the units of a layer, C the classes. Activations are (U, B). Arrays are
C-contiguous and of one dtype, float32 or float64, unless said otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.heads import optimizer
from featcache.heads.head import BATCH_NORM_EPS, BATCH_NORM_MOMENTUM

_Array = npt.NDArray[Any]
_BLOCK_VALUES = 1 << 15  # 128 KiB of float32: several of them stay in the cache of a core


def normalise_columns(x: _Array, normed: _Array, mean: _Array, variance: _Array) -> None:
    """Normalise a batch of features: the first batch norm without its scale and shift.

    Args:
        x: (B, D), two rows or more.
        normed: (B, D), written.
        mean: (D,), written.
        variance: (D,), written; with Bessel's correction, as running statistics take it.
    """
    np.mean(x, 0, out=mean)
    np.subtract(x, mean, out=normed)
    squares = np.einsum("bd,bd->d", normed, normed)
    normed *= 1 / np.sqrt(squares / len(x) + BATCH_NORM_EPS)
    np.divide(squares, len(x) - 1, out=variance)


def relu_and_normalise(  # noqa: PLR0917
    z: _Array, bias: _Array, scale: _Array, shift: _Array, running_mean: _Array,
    running_var: _Array, normed: _Array, inverse: _Array, out: _Array,
) -> None:  # fmt: skip
    """Finish a hidden layer: bias, ReLU and the batch norm that follows.

    Args:
        z: (U, B) products of weights and inputs; becomes what the ReLU gives.
        bias: (U,) of the layer.
        scale: (U,) of the batch norm.
        shift: (U,) of the batch norm.
        running_mean: (U,), moved a tenth of the way.
        running_var: (U,), moved a tenth of the way.
        normed: (U, B), written: the batch norm without scale and shift.
        inverse: (U,), written: 1 / sqrt(variance + eps).
        out: (U, B), written.
    """
    num_rows = z.shape[1]
    z += bias[:, None]
    np.maximum(z, 0, out=z)
    mean = z.mean(1)
    np.subtract(z, mean[:, None], out=normed)
    squares = np.einsum("ub,ub->u", normed, normed)
    np.divide(1, np.sqrt(squares / num_rows + BATCH_NORM_EPS), out=inverse)
    normed *= inverse[:, None]
    np.multiply(normed, scale[:, None], out=out)
    out += shift[:, None]
    running_mean += (mean - running_mean) * BATCH_NORM_MOMENTUM
    running_var += (squares / (num_rows - 1) - running_var) * BATCH_NORM_MOMENTUM


def loss_and_gradient(logits: _Array, weights: _Array, denominators: _Array, grad: _Array) -> float:
    """Return the loss of a batch, and write its gradient: see module ``loss``.

    Args:
        logits: (C, B).
        weights: (B, C) for one class a row, (B, 2 C) for several labels a row.
        denominators: (B,), whose sum over the batch the loss is divided by.
        grad: (C, B), written.
    """
    total = denominators.sum()
    if weights.shape[1] == len(logits):
        shifted = logits - logits.max(0)
        log_probs = shifted - np.log(np.exp(shifted).sum(0))
        np.multiply(np.exp(log_probs), weights.sum(1), out=grad)
        grad -= weights.T
        loss = -(weights.T * log_probs).sum()
    else:
        yes, no = weights[:, : len(logits)].T, weights[:, len(logits) :].T
        log_probs = np.minimum(logits, 0) - np.log1p(np.exp(-np.abs(logits)))
        np.multiply(np.exp(log_probs), yes + no, out=grad)
        grad -= yes
        loss = (no * logits - (yes + no) * log_probs).sum()
    grad /= total
    return float(loss / total)


def norm_and_relu_backward(  # noqa: PLR0917
    grad: _Array, normed: _Array, inverse: _Array, scale: _Array, active: _Array, out: _Array,
    scale_grad: _Array, shift_grad: _Array, bias_grad: _Array,
) -> None:  # fmt: skip
    """Take a gradient back through a batch norm and the ReLU before it.

    Args:
        grad: (U, B), of the loss by what the batch norm gave.
        normed: (U, B), from ``relu_and_normalise`` as the next is.
        inverse: (U,).
        scale: (U,) of the batch norm.
        active: (U, B), what the ReLU gave.
        out: (U, B), written: the gradient by what the ReLU got.
        scale_grad: (U,), written, as is the next.
        shift_grad: (U,).
        bias_grad: (U,), written: the sum of ``out`` over the batch.
    """
    num_rows = grad.shape[1]
    np.einsum("ub,ub->u", grad, normed, out=scale_grad)
    np.sum(grad, 1, out=shift_grad)
    np.multiply(normed, (-scale_grad / num_rows)[:, None], out=out)
    out += grad
    out -= (shift_grad / num_rows)[:, None]
    out *= (scale * inverse)[:, None]
    out *= active > 0
    np.sum(out, 1, out=bias_grad)


def move_layer(  # noqa: PLR0917
    grad: _Array, bias_grad: _Array, scale: _Array, shift: _Array, weights: _Array, first: _Array,
    second: _Array, scale_grad: _Array, shift_grad: _Array, settings: _Array,
) -> None:  # fmt: skip
    """Move some units of a layer whose input was ``normed * scale + shift``.

    With s the gradient of the bias, the gradient of the weights is grad * scale + s * shift, and
    the layer's shares of the gradients of scale and shift are the sums over the units of
    weights * grad and weights * s: the layer's input needs no gradient for them.

    Args:
        grad: (n, D), the gradient of the n units' outputs times ``normed``.
        bias_grad: (n,).
        scale: (D,).
        shift: (D,).
        weights: (n, D), moved.
        first: (n, D) moments, moved.
        second: (n, D) moments, moved; of SGD not used.
        scale_grad: (D,), written, as is the next.
        shift_grad: (D,).
        settings: From ``optimizer.step_settings``.
    """
    np.einsum("ud,ud->d", weights, grad, out=scale_grad)
    np.dot(bias_grad, weights, out=shift_grad)
    num_units = max(1, _BLOCK_VALUES // weights.shape[1])
    for start in range(0, len(weights), num_units):
        part = slice(start, start + num_units)
        slopes = grad[part]
        slopes *= scale
        slopes += bias_grad[part, None] * shift
        move_values(slopes, weights[part], first[part], second[part], settings)


def move_values(
    grads: _Array, values: _Array, first: _Array, second: _Array, settings: _Array
) -> None:
    """Move values against their gradients.

    Args:
        grads: Of any shape, used as scratch.
        values: Of that shape, moved, as are the next two.
        first: Moments; of SGD the momentum.
        second: Moments; of SGD not used.
        settings: From ``optimizer.step_settings``.
    """
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
    scratch = np.multiply(values, coupled_decay) if coupled_decay else np.empty_like(values)
    if coupled_decay:
        grads += scratch
    if is_sgd:
        first *= decay
        first += grads
        values -= np.multiply(first, step, out=scratch)
        return
    np.subtract(grads, first, out=scratch)
    scratch *= 1 - decay
    first += scratch
    grads *= grads
    grads *= 1 - second_decay
    second *= second_decay
    second += grads
    np.sqrt(second, out=scratch)
    scratch *= inverse_root_correction
    scratch += eps
    np.divide(first, scratch, out=scratch)
    scratch *= step
    if weight_factor != 1:
        values *= weight_factor
    values -= scratch


def shuffle(order: _Array, places: _Array) -> None:
    """Swap, for each i in turn, the entry i of ``order`` (n,) and the entry ``places[i]``."""
    shuffled = order.tolist()
    for i, place in enumerate(places.tolist()):
        shuffled[i], shuffled[place] = shuffled[place], shuffled[i]
    order[:] = shuffled
