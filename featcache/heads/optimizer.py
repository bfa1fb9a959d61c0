"""Adam, AdamW and SGD with momentum: what one step needs to know, the same on every path.

With g a gradient plus ``coupled`` times the value, Adam and AdamW move

    first += (g - first) * (1 - decay)
    second = second_decay * second + (1 - second_decay) * g * g
    value = kept * value - step * first / (sqrt(second) * root + eps)

and SGD ``first = decay * first + g``, ``value -= step * first``: as in ``torch.optim``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH_NORM_MOMENTUM = 0.1  # of running statistics: torch.nn.BatchNorm1d's
_BETAS, _EPS, _MOMENTUM = (0.9, 0.999), 1e-8, 0.9  # Adam's: torch.optim's defaults


def step_settings(
    optimizer: str, num_steps: int, rate: float, weight_decay: float, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return (is_sgd, step, coupled, kept, decay, second_decay, root, eps), (8,).

    Args:
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        num_steps: Steps taken so far, this one included.
        rate: The learning rate.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw).
        dtype: Of the result.
    """
    if optimizer == "sgd":
        return np.array([1, rate, weight_decay, 1, _MOMENTUM, 0, 1, 0], dtype)
    first, second = (1 - beta**num_steps for beta in _BETAS)
    coupled, kept = (weight_decay, 1.0) if optimizer == "adam" else (0.0, 1 - rate * weight_decay)
    return np.array([0, rate / first, coupled, kept, *_BETAS, 1 / math.sqrt(second), _EPS], dtype)
