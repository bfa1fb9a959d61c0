"""The optimizers of module ``optimizer``, compiled, for ``head_kernels``.

Reads, writes: arrays. Raises ``ImportError`` where there is no Numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.compiling import part

_Floats = npt.NDArray[np.float32]

ADAM, ADAMW, SGD = 0, 1, 2  # ``kind``: places in ``optimizer.OPTIMIZERS``

_ONE = np.float32(1)
_BETA_1, _BETA_2, _ADAM_EPS = np.float32(0.9), np.float32(0.999), np.float32(1e-8)
_SGD_MOMENTUM = np.float32(0.9)


@part
def move(  # noqa: PLR0917
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
