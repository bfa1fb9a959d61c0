"""What plain loops in torch need to be compared with trained heads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


class SeededDropout(nn.Module):
    """As ``nn.Dropout``, with masks from NumPy's generator of a head's seed."""

    def __init__(self, dropout: float, seed: int) -> None:
        super().__init__()
        self._dropout, self._generator = dropout, np.random.default_rng([seed, 1])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Drop some values while training."""
        if not self.training or not self._dropout:
            return values
        draws = torch.from_numpy(self._generator.random(tuple(values.shape), np.float32))
        return values * (draws >= self._dropout) / (1 - self._dropout)


def as_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return arrays by name as ``load_state_dict`` takes them."""
    return {name: torch.tensor(value) for name, value in state.items()}


def logits_of(head: nn.Module, features: Any) -> Any:
    """Return a head's logits (N, C) of features (N, D) in its own dtype, by torch."""
    dtype = next(head.parameters()).dtype
    with torch.inference_mode():
        return head.eval()(torch.tensor(np.asarray(features), dtype=dtype)).numpy()


def probs_of(head: nn.Module, features: Any, task: str = "multiclass") -> Any:
    """Return a head's probabilities (N, C) in float64, by torch."""
    logits = torch.from_numpy(logits_of(head, features)).double()
    return (logits.sigmoid() if task == "multilabel" else logits.softmax(1)).numpy()
