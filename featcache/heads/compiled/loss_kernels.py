"""The losses of module ``loss`` and their gradients, for ``head_kernels``.

Reads: arrays. Writes: ``grad``. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

_ONE, _HALF = np.float32(1), np.float32(0.5)


@part
def cross_entropy(  # noqa: PLR0917
    logits: _Floats, classes: _Ints, row_weights: _Floats, weights: _Floats, smoothing: np.float32,
    grad: _Floats,
) -> np.float32:  # fmt: skip
    """Return the loss of a batch and set its gradient, both (C, B): one class a row."""
    num_classes, num_rows = logits.shape
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
        top, norm = logits[:, row].max(), np.float32(0)
        for j in range(num_classes):
            grad[j, row] = np.exp(logits[j, row] - top)
            norm += grad[j, row]
        log_norm, counted = top + np.log(norm), own + shared * sum_of_weights
        for j in range(num_classes):
            wanted = shared * weights[j]
            if j == classes[row]:
                wanted += own
            loss += wanted * (log_norm - logits[j, row])
            grad[j, row] = grad[j, row] / norm * counted - wanted
    return loss


@part
def binary_cross_entropy(  # noqa: PLR0917
    logits: _Floats, labels: _Floats, row_weights: _Floats, weights: _Floats,
    smoothing: np.float32, grad: _Floats,
) -> np.float32:  # fmt: skip
    """Return the loss of a batch and set its gradient, both (C, B): several labels a row."""
    num_classes, num_rows = logits.shape
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
                grad[j, row] = np.float32(0)
                continue
            logit, share = logits[j, row], labels[row, j] * (_ONE - smoothing) + smoothing * _HALF
            yes, no = share * weights[j] * of_row, (_ONE - share) * of_row
            small = np.exp(-abs(logit))
            log_prob = min(logit, np.float32(0)) - np.log1p(small)
            loss += no * logit - (yes + no) * log_prob
            prob = (_ONE if logit > 0 else small) / (_ONE + small)
            grad[j, row] = prob * (yes + no) - yes
    return loss
