"""Adam, AdamW and SGD as one fused kernel a head, without importing ``torch.optim``'s machinery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ADAM_BETAS, _ADAM_EPS, _SGD_MOMENTUM = (0.9, 0.999), 1e-8, 0.9  # Adam's: torch.optim's


class StackOptimizer:
    """Adam, AdamW or SGD with momentum for K heads: the kernels of torch.optim's ``fused=True``.

    Attributes:
        kind: One of ``OPTIMIZERS``.
        first: (K, P), first moments; of SGD the momentum.
        second: (K, P), second moments.

    The kernels are called directly because constructing any ``torch.optim.Optimizer`` imports
    ``torch._dynamo``: 2.2 s of a cold process, more than the whole training of a head. A kernel
    passes over parameters, gradients and moments once, 28 bytes a parameter.

    Args:
        kind: One of ``OPTIMIZERS``.
        params: (K, P), what it moves.
        grads: (K, P).
        weight_decays: Of each head; added to the gradient (adam, sgd) or taken off the weights
            (adamw).
    """

    def __init__(
        self, kind: str, params: Tensor, grads: Tensor, weight_decays: Sequence[float]
    ) -> None:
        self.kind, self._weight_decays = kind, list(weight_decays)
        self.first = torch.zeros_like(params)
        self.second = torch.zeros_like(params) if kind != "sgd" else self.first
        self._num_steps, self._step = 0, torch.zeros((), device=params.device)
        self._bind(params, grads)

    def _bind(self, params: Tensor, grads: Tensor) -> None:
        self._rows = list(zip(params, grads, self.first, self.second, strict=True))

    def keep(self, heads: Sequence[int], params: Tensor, grads: Tensor) -> None:
        """Give up all but some heads, whose parameters and gradients now lie elsewhere."""
        index = torch.tensor(heads, device=params.device)
        self.first = self.first[index]
        self.second = self.second[index] if self.kind != "sgd" else self.first
        self._weight_decays = [self._weight_decays[head] for head in heads]
        self._bind(params, grads)

    def next_settings(self, rates: Sequence[float]) -> npt.NDArray[np.float32]:
        """Count a step that compiled code takes; return what it needs to know.

        Returns:
            (K, 4): learning rate, weight decay, and Adam's two corrections, 1 - beta ** steps.
        """
        self._num_steps += 1
        settings = np.empty((len(self._weight_decays), 4), np.float32)
        settings[:, 0], settings[:, 1] = rates, self._weight_decays
        settings[:, 2:] = [1 - beta**self._num_steps for beta in _ADAM_BETAS]
        return settings

    def step(self, rates: Sequence[float]) -> None:
        """Move every head against its gradient, each at its own rate."""
        self._num_steps += 1
        self._step.fill_(self._num_steps)
        for (param, grad, first, second), rate, decay in zip(
            self._rows, rates, self._weight_decays, strict=True
        ):
            if self.kind == "sgd":
                torch._fused_sgd_(
                    [param], [grad], [first], lr=rate, weight_decay=decay,
                    momentum=_SGD_MOMENTUM, dampening=0.0, nesterov=False, maximize=False,
                    is_first_step=False,  # the momentum is there, and zero
                )  # fmt: skip
            else:
                kernel = torch._fused_adam_ if self.kind == "adam" else torch._fused_adamw_
                kernel(
                    [param], [grad], [first], [second], [], [self._step], lr=rate,
                    beta1=_ADAM_BETAS[0], beta2=_ADAM_BETAS[1], weight_decay=decay,
                    eps=_ADAM_EPS, amsgrad=False, maximize=False,
                )  # fmt: skip
