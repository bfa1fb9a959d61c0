"""Adam, AdamW and SGD with momentum: what one step needs to know, the same on every path.

With g a gradient plus ``coupled_decay`` times the value, Adam and AdamW move

    first += (g - first) * (1 - decay)
    second = second_decay * second + (1 - second_decay) * g * g
    value = weight_factor * value - step * first / (sqrt(second) * inverse_root_correction + eps)

and SGD ``first = decay * first + g``, ``value -= step * first``: as in ``torch.optim``.

An optimizer whose step is one of these two with other constants needs a line in ``step_settings``
and no new kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

# Where each setting stands in the array of step_settings: the kernels take no other type.
IS_SGD = 0  # 1 for the step with one moment, 0 for that with two
STEP = 1  # the learning rate; for Adam and AdamW divided by 1 - beta1**t
COUPLED_DECAY = 2  # the weight decay that is added to the gradient: not AdamW's
WEIGHT_FACTOR = 3  # what AdamW multiplies the weights with, 1 for the others
DECAY = 4  # of the first moment: beta1, or the momentum
SECOND_DECAY = 5  # of the second moment, which SGD lacks: beta2
INVERSE_ROOT_CORRECTION = 6  # 1 / sqrt(1 - beta2**t)
EPS = 7  # added to the root

_BETAS, _EPS, _MOMENTUM = (0.9, 0.999), 1e-8, 0.9  # Adam's: torch.optim's defaults


def step_settings(
    optimizer: str, num_steps: int, rate: float, weight_decay: float, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return the settings of a step, (8,): ``IS_SGD`` and the constants after it say where.

    Args:
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        num_steps: Steps taken so far, this one included.
        rate: The learning rate.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw).
        dtype: Of the result.

    Raises:
        ValueError: If the optimizer is another.
    """
    if optimizer not in {"adam", "adamw", "sgd"}:
        raise ValueError(f"no step is known for the optimizer {optimizer}")
    if optimizer == "sgd":
        return np.array([1, rate, weight_decay, 1, _MOMENTUM, 0, 1, 0], dtype)
    first, second = (1 - beta**num_steps for beta in _BETAS)
    is_coupled = optimizer == "adam"
    coupled_decay = weight_decay if is_coupled else 0.0
    weight_factor = 1.0 if is_coupled else 1 - rate * weight_decay
    step, inverse_root_correction = rate / first, 1 / math.sqrt(second)
    return np.array(
        [0, step, coupled_decay, weight_factor, *_BETAS, inverse_root_correction, _EPS], dtype
    )
