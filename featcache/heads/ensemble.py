"""The mean of several heads' probabilities, as one torch module.

Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import logsigmoid


class MeanOfHeads(nn.ModuleList):
    """Features (B, D) to the logits (B, C) of the mean of the heads' probabilities.

    Softmax of them, or sigmoid for several labels an image, gives that mean. For softmax they are
    its logarithm.

    Args:
        heads: Features (B, D) to logits (B, C), one or more.
        task: ``multiclass`` or ``multilabel``.
    """

    def __init__(self, heads: Sequence[nn.Module], task: str) -> None:
        super().__init__(heads)
        self.task = task

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the logits of the mean."""
        logits = torch.stack([head(features) for head in self])
        if self.task == "multilabel":
            return logsigmoid(logits).logsumexp(0) - logsigmoid(-logits).logsumexp(0)
        return logits.log_softmax(2).logsumexp(0) - math.log(len(self))


def mean_of_heads(heads: Sequence[nn.Module], task: str) -> nn.Sequential:
    """Return the mean as the one layer, ``members``, of a head.

    The names in its state dict are those of ``head.safetensors``.
    """
    return nn.Sequential(OrderedDict(members=MeanOfHeads(heads, task)))
