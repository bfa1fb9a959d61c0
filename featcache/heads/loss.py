"""Two losses with their gradients: one class a row, and several labels a row.

Both take logits (K, B, C) of K heads and what is wanted of a batch, and give the losses (K,) and
their gradient (K, B, C) by the logits. What is wanted are weights: by what each negative
log-probability counts in the loss. Masks, class weights, smoothing and the mean are in them.

Several labels are C yes-or-no questions a row, some without a known answer. The mean is over the
known answers of the batch, whatever their classes or their weights: with ``known`` of ones and
zeros and the unknown targets set to anything,

    binary_cross_entropy_with_logits(logits, targets, weight=known, reduction="sum") / known.sum()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from featcache.errors import ConfigError

Loss: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits (K, B, C) and what is wanted of them -> losses (K,) and the gradient (K, B, C)."""


def cross_entropy(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and gradient for one class a row.

    Args:
        logits: (K, B, C).
        wanted: (K, B, C), by what each class' negative log-probability counts: of plain
            cross-entropy, the one-hot targets over B.
    """
    log_probs = logits.log_softmax(2)
    losses = -(wanted * log_probs).sum((1, 2))
    return losses, log_probs.exp_().mul_(wanted.sum(2, keepdim=True)).sub_(wanted)


def binary_cross_entropy(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and gradient for several labels a row.

    Args:
        logits: (K, B, C).
        wanted: (K, B, 2 C), by what -log p of each class counts, then -log (1 - p) of each; both
            0 where the target is unknown.
    """
    yes, no = wanted.chunk(2, 2)
    log_probs = functional.logsigmoid(logits)
    # log (1 - p) = log p - logit, exact also where p is all but 1
    losses = (no * logits - (yes + no) * log_probs).sum((1, 2))
    return losses, log_probs.exp_().mul_(yes + no).sub_(yes)


def want_classes(
    targets: Tensor, weights: Tensor, smoothing: float, row_weights: Tensor | None
) -> Tensor:
    """Return what ``cross_entropy`` wants of a batch, (B, C).

    As in ``torch.nn.functional.cross_entropy``: the mean is over the weights of the targets.

    Args:
        targets: (B,) int64.
        weights: (C,) of the classes.
        smoothing: Share of each target that is spread evenly over all classes.
        row_weights: (B,), or None.
    """
    of_targets = weights[targets]
    # A comparison, as torch's one_hot looks for the largest target first: 0.1 ms of a step of 4.
    wanted = (targets[:, None] == torch.arange(len(weights), device=targets.device)).to(weights)
    wanted *= of_targets[:, None] * (1 - smoothing)
    if smoothing:
        wanted += weights * (smoothing / len(weights))
    if row_weights is not None:
        wanted *= row_weights[:, None]
        of_targets = of_targets * row_weights
    return wanted / of_targets.sum()


def want_labels(
    targets: Tensor, weights: Tensor, smoothing: float, row_weights: Tensor | None
) -> Tensor:
    """Return what ``binary_cross_entropy`` wants of a batch, (B, 2 C).

    As ``torch.nn.functional.binary_cross_entropy_with_logits`` with ``pos_weight``: the mean is
    over the known targets, weighed by their rows alone.

    Args:
        targets: (B, C) of 0, 1 and NaN = unknown, at least one of them known.
        weights: (C,) by what a positive counts, a negative counting 1.
        smoothing: Share of each target that is spread evenly over yes and no.
        row_weights: (B,), or None.
    """
    known = (~targets.isnan()).to(targets.dtype)
    if row_weights is not None:
        known *= row_weights[:, None]
    yes = targets.nan_to_num() * (1 - smoothing) + smoothing / 2
    return torch.cat([yes * weights * known, (1 - yes) * known], 1) / known.sum()


def weigh_classes(
    kind: str | Sequence[float], targets: Tensor, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """Return the weights (C,) of one class a row, or of the positives of several labels a row.

    ``balanced`` is N / (C * n) for n of N rows, and for labels the known negatives of the class
    over its known positives: 1 where it has none of either, or it would not be trained at all.

    Args:
        kind: ``none``, ``balanced`` or C numbers.
        targets: (N,) int64, or (N, C) of 0, 1 and NaN.
        num_classes: C.
        dtype: Of the weights.

    Raises:
        ConfigError: If there are not C numbers.
    """
    if kind == "none":
        return torch.ones(num_classes, dtype=dtype, device=targets.device)
    if kind != "balanced":
        if len(kind) != num_classes:
            found = len(kind)
            raise ConfigError("--class-weights", expected=f"{num_classes} numbers", found=found)
        return torch.tensor(kind, dtype=dtype, device=targets.device)
    if targets.ndim == 2:
        num_yes, num_no = ((targets == answer).sum(0).to(dtype) for answer in (1, 0))
        return torch.where((num_yes > 0) & (num_no > 0), num_no / num_yes, 1)
    counts = torch.bincount(targets, minlength=num_classes).clamp(min=1)
    return (len(targets) / (num_classes * counts.double())).to(dtype)
