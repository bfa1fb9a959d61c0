"""Adam, AdamW and SGD as one fused kernel a step, without importing ``torch.optim``'s machinery."""

from __future__ import annotations

import torch
from torch import Tensor

OPTIMIZERS = ("adam", "adamw", "sgd")

_ADAM_BETAS, _ADAM_EPS, _SGD_MOMENTUM = (0.9, 0.999), 1e-8, 0.9  # Adam's: torch.optim's


class FusedOptimizer:
    """Adam, AdamW or SGD with momentum: the kernels of torch.optim's ``fused=True``, one a step.

    They are called directly because constructing any ``torch.optim.Optimizer`` imports
    ``torch._dynamo``: 2.2 s of a cold process, more than the whole training of a head.

    Args:
        kind: One of ``OPTIMIZERS``.
        weight_decay: Added to the gradient (adam, sgd) or taken off the weights (adamw).
        params: What it moves.
    """

    def __init__(self, kind: str, weight_decay: float, params: list[Tensor]) -> None:
        self._kind, self._weight_decay = kind, weight_decay
        self._params = params
        self._first = [torch.zeros_like(p) for p in params]
        self._second = [torch.zeros_like(p) for p in params]
        self._steps = [torch.zeros((), device=p.device) for p in params]

    def step(self, loss: Tensor, rate: float) -> None:
        """Move every parameter against the gradient of ``loss``."""
        grads = list(torch.autograd.grad(loss, self._params))
        with torch.no_grad():
            if self._kind == "sgd":
                torch._fused_sgd_(
                    self._params, grads, self._first, lr=rate, weight_decay=self._weight_decay,
                    momentum=_SGD_MOMENTUM, dampening=0.0, nesterov=False, maximize=False,
                    is_first_step=False,  # the momentum is there, and zero
                )  # fmt: skip
                return
            torch._foreach_add_(self._steps, 1)
            kernel = torch._fused_adam_ if self._kind == "adam" else torch._fused_adamw_
            kernel(
                self._params, grads, self._first, self._second, [], self._steps, lr=rate,
                beta1=_ADAM_BETAS[0], beta2=_ADAM_BETAS[1], weight_decay=self._weight_decay,
                eps=_ADAM_EPS, amsgrad=False, maximize=False,
            )  # fmt: skip
